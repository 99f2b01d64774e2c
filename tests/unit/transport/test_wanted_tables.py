# SPDX-License-Identifier: Apache-2.0
"""One answer to each request for tables, also while the answer is still being looked at."""

import asyncio

import numpy as np
import pytest

from lynx_connector.errors import ProtocolError
from lynx_connector.transport.connection import checksum
from lynx_connector.transport.tables import WantedTables
from lynx_connector.wire import messages

DIGEST = "d" * 32
DATA = np.arange(8, dtype=np.uint8)


class Sink:
    """Keeps nothing, or fails."""

    max_bytes = 8

    def __init__(self, error=None):
        self.error = error

    def known(self, digest):
        return False

    def accept(self, digest, data):
        if self.error is not None:
            raise self.error


def header(check):
    return messages.Tables(DIGEST, DATA.nbytes, check)


async def asked(sink):
    wanted = WantedTables("peer", sink)
    assert await wanted.request(DIGEST) == messages.TablesRequest(DIGEST)
    return wanted


def test_a_second_answer_was_not_asked_for():
    async def run():
        wanted = await asked(Sink())
        wanted.buffer(header(0))
        with pytest.raises(ProtocolError, match=f"unexpected tables {DIGEST}"):
            wanted.buffer(header(0))
        with pytest.raises(ProtocolError, match=f"unexpected NoTables {DIGEST}"):
            wanted.gone(DIGEST)
        assert await wanted.arrived(header(checksum(DATA)), DATA) == (None, None)
        assert DIGEST not in wanted

    asyncio.run(run())


def test_an_unusable_answer_is_asked_for_once_more_and_may_come():
    async def run():
        wanted = await asked(Sink())
        wanted.buffer(header(0))
        again, cause = await wanted.arrived(header(0), DATA)
        assert (again, cause) == (messages.TablesRequest(DIGEST), None)
        wanted.buffer(header(checksum(DATA)))
        assert await wanted.arrived(header(checksum(DATA)), DATA) == (None, None)

    asyncio.run(run())


def test_after_any_failure_the_request_is_not_open():
    async def run():
        wanted = await asked(Sink(RuntimeError("no compiler")))
        wanted.buffer(header(checksum(DATA)))
        with pytest.raises(RuntimeError, match="no compiler"):
            await wanted.arrived(header(checksum(DATA)), DATA)
        assert DIGEST not in wanted

    asyncio.run(run())
