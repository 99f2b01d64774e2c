# SPDX-License-Identifier: Apache-2.0
"""Says in the log what a start waits for while kernels are compiled."""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator

logger = logging.getLogger("vllm.lynx")

QUIET_SECONDS = 3.0
"""Kernels that were kept from an earlier start are there sooner; of those nothing is said."""


@contextlib.contextmanager
def compiling(what: str) -> Iterator[None]:
    """Around a compilation: one line when it takes longer than a few seconds, one at its end."""
    began = time.monotonic()
    timer = threading.Timer(QUIET_SECONDS, _begin, [what])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        seconds = time.monotonic() - began
        if seconds >= QUIET_SECONDS:
            logger.info("lynx: kernels for %s: compiled in %.0f s", what, seconds)


def _begin(what: str) -> None:
    logger.info(
        "lynx: compiling kernels for %s, once for this machine and dtype; takes up to some two "
        "minutes on a slow core, and `lynx warm MODEL` does it ahead of a start",
        what,
    )
