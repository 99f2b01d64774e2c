# SPDX-License-Identifier: Apache-2.0
"""Keeps the leases of transfers whose decode requests wait for room.

A producer drops what nobody has asked for within `lease_seconds`. A decode instance that knows a
request, but cannot load it yet, says so once a second.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator

from lynx_connector.wire import messages

INTERVAL_SECONDS = 1.0


class Holds:
    """The transfers that one connection holds. All methods run in the transport loop."""

    def __init__(self, send: Callable[[messages.Hold], Awaitable[None]]):
        self._send = send
        self._held: dict[str, None] = {}
        self._changed = asyncio.Event()

    def add(self, transfer_id: str) -> None:
        """Hold a transfer from now on."""
        self._held[transfer_id] = None
        self._changed.set()

    def discard(self, transfer_id: str) -> None:
        """It is fetched now, or not wanted."""
        self._held.pop(transfer_id, None)

    def __len__(self) -> int:
        return len(self._held)

    async def run(self) -> None:
        """Send until cancelled, or until the connection is lost.

        Raises:
            ConnectionError, TransferError: it was.
        """
        while True:
            while not self._held:
                self._changed.clear()
                await self._changed.wait()
            for message in self._messages():
                await self._send(message)
            await asyncio.sleep(INTERVAL_SECONDS)

    def _messages(self) -> Iterator[messages.Hold]:
        names = list(self._held)
        for start in range(0, len(names), messages.MAX_HELD):
            yield messages.Hold(names[start : start + messages.MAX_HELD])
