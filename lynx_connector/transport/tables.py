# SPDX-License-Identifier: Apache-2.0
"""Learned tables that a consumer has asked one producer worker for."""

import asyncio
import logging
import time
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from lynx_connector.errors import LynxError, ProtocolError
from lynx_connector.transport.connection import checksum
from lynx_connector.wire import messages

logger = logging.getLogger("vllm.lynx.client")

REQUESTS = 2
"""The first one, and one more where the answer was unusable."""


class TablesSink(Protocol):
    """Where tables go. `known` and `accept` may read or write files: called from other threads."""

    max_bytes: int
    """Larger ones cannot be tables of this geometry."""

    def known(self, digest: str) -> bool:
        """Whether these tables are here."""

    def accept(self, digest: str, data: np.ndarray) -> None:
        """Keep tables; raises LynxError naming what is wrong with them."""


@dataclass
class _Request:
    requests: int = 1
    answered: bool = False
    """The answer is here and being looked at."""
    since: float = field(default_factory=time.monotonic)


class WantedTables:
    """Requests of one connection: one per digest, and one more if the answer is unusable."""

    def __init__(self, peer: str, sink: TablesSink):
        self._peer = peer
        self._sink = sink
        self._open: dict[str, _Request] = {}

    def __contains__(self, digest: str) -> bool:
        """Whether the answer to a request for `digest` is still to come."""
        return digest in self._open

    async def request(self, digest: str) -> messages.TablesRequest | None:
        """The message to send for `digest`; None if it is here or asked for."""
        if digest in self._open:
            return None
        # Before the first await: whoever comes next must see that it is being asked for.
        self._open[digest] = _Request()
        if await asyncio.to_thread(self._sink.known, digest):
            del self._open[digest]
            return None
        return messages.TablesRequest(digest)

    def buffer(self, header: messages.Tables) -> np.ndarray:
        """Memory for the payload, which is on its way whether it is acceptable or not.

        Raises:
            ProtocolError: nobody asked for these.
        """
        request = self._open.get(header.digest)
        if request is None or request.answered:
            raise ProtocolError(f"unexpected tables {header.digest}")
        request.answered = True
        request.since = time.monotonic()
        return np.empty(header.num_bytes, np.uint8)

    async def arrived(
        self, header: messages.Tables, data: np.ndarray
    ) -> tuple[messages.TablesRequest | None, str | None]:
        """Hand tables over: (None, None), or what to send again, or why they are given up.

        May take seconds: what else comes over the connection must not wait for it.
        """
        request = self._open[header.digest]
        try:
            if data.nbytes > self._sink.max_bytes:
                raise ProtocolError(
                    f"{data.nbytes} bytes, at most {self._sink.max_bytes} fit this model"
                )
            if checksum(data) != header.checksum:
                raise ProtocolError("checksum differs")
            await asyncio.to_thread(self._sink.accept, header.digest, data)
        except LynxError as error:
            logger.warning(
                "lynx: tables %s from %s refused: %s%s",
                header.digest,
                self._peer,
                error,
                "; asking once more" if request.requests < REQUESTS else "",
            )
            if request.requests < REQUESTS:
                request.requests += 1
                request.answered = False
                request.since = time.monotonic()
                return messages.TablesRequest(header.digest), None
            del self._open[header.digest]
            return None, f"refused: {error}"
        except Exception:
            del self._open[header.digest]
            raise
        del self._open[header.digest]
        return None, None

    def gone(self, digest: str) -> None:
        """The producer does not have them."""
        request = self._open.get(digest)
        if request is None or request.answered:
            raise ProtocolError(f"unexpected NoTables {digest}")
        del self._open[digest]

    def overdue(self, seconds: float) -> list[str]:
        """Digests whose answer is late: who waits gives up, who comes later waits as long again.

        A late answer is still welcome.
        """
        now = time.monotonic()
        late = [digest for digest, one in self._open.items() if one.since < now - seconds]
        for digest in late:
            self._open[digest].since = now
        return late
