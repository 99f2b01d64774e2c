# SPDX-License-Identifier: Apache-2.0
"""Sends for all connections of a producer worker: one frame after the other, in `SendOrder`.

A frame is cut when its turn has come, so that at most `Window`'s bytes are ahead of what becomes
urgent next. Nothing here waits for one peer.
"""

import asyncio
import itertools
import logging
import time
from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np

from lynx_connector.transport.connection import Connection
from lynx_connector.transport.order import SendOrder
from lynx_connector.transport.pacing import RateLimiter
from lynx_connector.transport.rate import RateMeter
from lynx_connector.transport.window import OVERDUE_SECONDS, Flight, Window
from lynx_connector.wire import messages

logger = logging.getLogger("vllm.lynx.server")


class Outgoing(NamedTuple):
    """A header and the payload (uint8) that follows it."""

    header: messages.Payload
    payload: np.ndarray


class FrameSource(ABC):
    """What one connection has to send of one thing; a `Source` of `SendOrder`."""

    def __init__(self, connection: Connection, rank: int, order: int, key: str):
        self.connection = connection
        self.rank = rank
        self.order = order
        self.key = key
        """What it is a part of: a transfer's id or a digest."""

    @property
    @abstractmethod
    def ready(self) -> bool:
        """As `Source.ready`."""

    @property
    @abstractmethod
    def finished(self) -> bool:
        """Whether everything was taken."""

    @property
    def dropped(self) -> bool:
        """Whether what was taken should not be sent any more."""
        return False

    @abstractmethod
    def take(self, max_bytes: int) -> Outgoing | None:
        """The next frame; None where there is nothing to send after all."""

    @abstractmethod
    def failed(self) -> None:
        """`take` raised: nothing more will be asked of this source."""

    @abstractmethod
    def waited(self, out: Outgoing) -> float:
        """Seconds for which a frame that was just taken could have gone."""

    @abstractmethod
    def sent(self, out: Outgoing, waited: float, seconds: float) -> None:
        """The peer has a frame, `seconds` after its turn came and `waited` before that."""

    @abstractmethod
    def delivered(self) -> None:
        """The last frame was taken by the peer."""


class LinkSender:
    """The one sender of a link. All methods run in the transport loop."""

    def __init__(self, frame_bytes: int, link_mbit: float, rates: RateMeter):
        self._rates = rates
        self._limiter = RateLimiter(link_mbit)
        self._window = Window(frame_bytes)
        self._sources: SendOrder[FrameSource] = SendOrder()
        self._numbers = itertools.count()
        self._wake = asyncio.Event()

    def number(self) -> int:
        """The next fetch's place in the order."""
        return next(self._numbers)

    def add(self, source: FrameSource) -> None:
        """Queue a source."""
        self._sources.add(source)
        self._wake.set()

    def cancel(self, connection: Connection, key: str) -> None:
        """Take what belongs to `key` out of a connection's queue."""
        for source in self.sources(connection):
            if source.key == key:
                self._sources.discard(source)

    def sources(self, connection: Connection) -> list[FrameSource]:
        """What a connection has in the queue."""
        return [source for source in self._sources if source.connection is connection]

    def forget(self, connection: Connection) -> None:
        """A connection ended."""
        for source in self.sources(connection):
            self._sources.discard(source)
        self._window.forget(connection)
        self._wake.set()

    def wake(self) -> None:
        """Something may have become ready."""
        self._wake.set()

    def stalled(self, connection: Connection) -> bool:
        """Whether the peer takes nothing of what it was sent."""
        return self._window.overdue(connection, time.monotonic())

    async def run(self) -> None:
        """Send until cancelled."""
        while True:
            self._wake.clear()
            source = self._choose()
            if source is not None:
                await self._send(source)
            elif len(self._sources):
                # A peer that stops taking frames gives no sign: look again when it is overdue.
                await self._woken(OVERDUE_SECONDS)
            else:
                await self._wake.wait()

    async def _woken(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            pass

    def _choose(self) -> FrameSource | None:
        now = time.monotonic()
        if not self._window.has_room(now):
            return None
        return self._sources.next(now, self._window.accepts)

    async def _send(self, source: FrameSource) -> None:
        try:
            out = source.take(self._window.frame_bytes)
        except Exception:  # one request's fault; everybody else's frames go on
            logger.exception("lynx: cannot send to %s", source.connection.peer)
            self._sources.discard(source)
            source.failed()
            return
        if out is None:
            self._sources.discard(source)
            return
        size = out.payload.nbytes
        waited, began = source.waited(out), self._rates.now()
        self._sources.sent(size)
        await self._limiter.acquire(size)
        if source.dropped or source not in self._sources:
            return  # cancelled meanwhile; if it was dropped, its next turn tells the consumer
        flight = self._window.sent(source.connection, size, time.monotonic())
        last = source.finished
        if last:
            self._sources.discard(source)
        send = asyncio.ensure_future(source.connection.send(out.header, out.payload))
        send.add_done_callback(
            self._rates.on_sent(source.connection.peer, out.payload.nbytes, began)
        )

        def landed(done: asyncio.Future) -> None:
            self._landed(done, flight)
            if not done.cancelled() and done.exception() is None:
                source.sent(out, waited, self._rates.now() - began)
                if last:
                    source.delivered()

        send.add_done_callback(landed)

    def _landed(self, done: asyncio.Future, flight: Flight) -> None:
        self._window.landed(flight, time.monotonic())
        self._wake.set()
        # A lost connection is reported by the reader; here it only must not go unretrieved.
        if not done.cancelled():
            done.exception()
