# SPDX-License-Identifier: Apache-2.0
"""What a link really carries, measured while it is busy."""

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

TRUSTED_BYTES = 1 << 20
"""A peer's rate is not given before so much has been acknowledged."""

MEMORY_SECONDS = 3.0
"""Busy seconds after which a measurement weighs 1/e."""

FORGET_SECONDS = 600.0
"""A peer that has fetched nothing for so long says nothing of the next request."""


@dataclass
class _Peer:
    total: int = 0
    num_bytes: float = 0.0
    seconds: float = 0.0
    until: float = -math.inf
    """End of the last send: time before it is counted."""


class RateMeter:
    """Acknowledged bytes per busy second, by peer: a moving average over busy time.

    Sends of one peer may overlap; a moment counts once, and only while a send is under way. Written
    by the transport thread, read by any.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._peers: dict[str, _Peer] = {}

    def now(self) -> float:
        """The time to give to `sent` as `began`."""
        return self._clock()

    def sent(self, peer: str, num_bytes: int, began: float) -> None:
        """A send that began at `began` is complete: the peer has the bytes."""
        now = self._clock()
        if peer not in self._peers:
            self._forget(now)
        one = self._peers.setdefault(peer, _Peer())
        seconds = now - min(now, max(began, one.until))
        fade = math.exp(-seconds / MEMORY_SECONDS)
        one.num_bytes = one.num_bytes * fade + num_bytes
        one.seconds = one.seconds * fade + seconds
        one.total += num_bytes
        one.until = now

    def on_sent(self, peer: str, num_bytes: int, began: float) -> Callable[[asyncio.Future], None]:
        """`sent` as a callback of a send; one that failed counts for nothing."""

        def done(future: asyncio.Future) -> None:
            if not future.cancelled() and future.exception() is None:
                self.sent(peer, num_bytes, began)

        return done

    @property
    def mbit(self) -> float:
        """Mbit/s of the slowest peer that fetched lately; 0 while nothing is known.

        The slowest, since a prefill does not know which peer will fetch: sending too few bits over
        a fast link costs little, too many over a slow one cost seconds.
        """
        now = self._clock()
        rates = [
            one.num_bytes / one.seconds * 8e-6
            for one in list(self._peers.values())
            if one.total >= TRUSTED_BYTES and one.seconds > 0 and now - one.until < FORGET_SECONDS
        ]
        return min(rates, default=0.0)

    def _forget(self, now: float) -> None:
        self._peers = {
            peer: one for peer, one in self._peers.items() if now - one.until < FORGET_SECONDS
        }
