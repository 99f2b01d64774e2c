# SPDX-License-Identifier: Apache-2.0
"""How much may be in flight, so that what becomes urgent overtakes all but a little.

Two frames: one on the link and one behind it, so that the link never idles. A frame is what the
link carries in `FRAME_SECONDS` at the rate that was measured, within bounds: on a slow link large
frames would hold up a late anchor, on a fast one small ones would cost more work than they save.
Pure decisions: no clock, no sockets.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field

FRAME_SECONDS = 0.01
MIN_FRAME_BYTES = 64 << 10
_MEMORY = 7 / 8
"""Weight of what was known of the rate when another frame has landed."""

_SLACK = 1.25
"""The rate, and so the frame, wavers: a frame in flight may be a little more than the next one."""

OVERDUE_SECONDS = 0.25


@dataclass(eq=False)
class Flight:
    """A frame that was handed to UCX and has not been taken by the peer."""

    connection: Hashable
    num_bytes: int
    sent_at: float


@dataclass
class _Connection:
    flights: set[Flight] = field(default_factory=set)
    moved_at: float = 0.0
    """When its peer last took a frame, or the first of these flights began."""

    @property
    def num_bytes(self) -> int:
        return sum(flight.num_bytes for flight in self.flights)


class Window:
    """Frames in flight on one link and on each connection over it; times as in `SendOrder`.

    A connection whose peer takes nothing for a while is overdue: it keeps what it has, at most a
    window's bytes, but is not counted as filling the link, so that it holds up nobody else.
    """

    def __init__(self, max_frame_bytes: int):
        self._max_frame = max_frame_bytes
        self._connections: dict[Hashable, _Connection] = {}
        self._last_landed = 0.0
        self._bytes = 0.0
        self._seconds = 0.0

    @property
    def rate(self) -> float:
        """Bytes a second that the link was measured to carry; 0 while unknown."""
        return self._bytes / self._seconds if self._seconds else 0.0

    @property
    def frame_bytes(self) -> int:
        """Size of the next frame."""
        wanted = int(self.rate * FRAME_SECONDS) if self.rate else self._max_frame // 4
        return min(max(wanted, MIN_FRAME_BYTES), self._max_frame)

    def overdue(self, connection: Hashable, now: float) -> bool:
        """Whether the peer has taken nothing for longer than the link can explain."""
        state = self._connections.get(connection)
        if state is None or not state.flights:
            return False
        usual = state.num_bytes / self.rate if self.rate else 0.0
        return now - state.moved_at > max(OVERDUE_SECONDS, 4 * usual)

    def has_room(self, now: float) -> bool:
        """Whether the link may be given another frame."""
        filled = sum(
            state.num_bytes
            for connection, state in self._connections.items()
            if not self.overdue(connection, now)
        )
        return filled <= _SLACK * self.frame_bytes

    def accepts(self, connection: Hashable) -> bool:
        """Whether a connection may be given another frame."""
        state = self._connections.get(connection)
        return state is None or state.num_bytes <= _SLACK * self.frame_bytes

    def sent(self, connection: Hashable, num_bytes: int, now: float) -> Flight:
        """Count a frame as in flight."""
        state = self._connections.setdefault(connection, _Connection())
        if not state.flights:
            state.moved_at = now
        flight = Flight(connection, num_bytes, now)
        state.flights.add(flight)
        return flight

    def landed(self, flight: Flight, now: float) -> None:
        """A frame was taken by the peer (or lost with its connection)."""
        state = self._connections.get(flight.connection)
        if state is None or flight not in state.flights:
            return  # forgotten meanwhile
        state.flights.discard(flight)
        state.moved_at = now
        busy = now - max(flight.sent_at, self._last_landed)
        self._bytes = self._bytes * _MEMORY + flight.num_bytes
        self._seconds = self._seconds * _MEMORY + max(busy, 0.0)
        self._last_landed = now

    def forget(self, connection: Hashable) -> None:
        """A connection is gone, with all that was in flight on it."""
        self._connections.pop(connection, None)
