# SPDX-License-Identifier: Apache-2.0
"""Log lines that nobody else can write into: every text that is put into one is `shown`.

Request ids, transfer ids, hosts and causes come from clients, routers and peers; a line break or a
terminal's control sequence in one would forge lines, a megabyte would bury them.
"""

import logging

from lynx_connector.errors import shown

LOGGERS = (
    "vllm.lynx",
    "vllm.lynx.bootstrap",
    "vllm.lynx.client",
    "vllm.lynx.consumer",
    "vllm.lynx.plan",
    "vllm.lynx.producer",
    "vllm.lynx.server",
    "vllm.lynx.tables",
    "vllm.lynx_connector.scheduler.mixin",
    "vllm.lynx_connector.scheduler.startup",
)
"""All loggers of the package; a filter works on the very logger only, not below it."""

LONGEST = 512


def _show_texts(record: logging.LogRecord) -> bool:
    if isinstance(record.args, tuple):
        record.args = tuple(
            shown(str(value), LONGEST) if isinstance(value, str | BaseException) else value
            for value in record.args
        )
    return True


for _name in LOGGERS:
    logging.getLogger(_name).addFilter(_show_texts)
