# SPDX-License-Identifier: Apache-2.0
"""Which of all that waits for the link goes next. Pure decisions: no clock, no sockets.

Tables first, then all anchors, then residuals, then exact tiers; within a rank the oldest fetch.
Ageing: once something has waited for `patience` seconds, one byte in `share` goes to the oldest
fetch that has waited so long, whatever its rank. Since a fetch is finite and later ones never come
before it there, nothing starves, and what is not late loses at most 1/`share` of the link.

A share of one half: with less, all of many requests that come at once are refined only when the
anchors of all have passed, and their median is later than if each had gone whole.
"""

from collections.abc import Callable, Hashable, Iterator
from typing import Generic, Protocol, TypeVar

PATIENCE_SECONDS = 0.5
SHARE = 2


class Source(Protocol):
    """Something with frames to send over one connection."""

    rank: int
    """Lower ones go first."""
    order: int
    """Number of the fetch that asked for it: lower ones are older."""
    connection: Hashable

    @property
    def ready(self) -> bool:
        """Whether there is something to send now."""


S = TypeVar("S", bound=Source)


class SendOrder(Generic[S]):
    """The queue of one link. Times are in seconds of any monotonic clock."""

    def __init__(self, patience: float = PATIENCE_SECONDS, share: int = SHARE):
        self._patience = patience
        self._share = share
        self._since: dict[S, float | None] = {}
        """When each source began to wait for the link; None while it is not ready."""
        self._debt = 0
        """Bytes that have overtaken what waits too long, beyond what its share allows."""
        self._late = False
        """Whether `next` chose what waits too long before what would go first."""

    def __len__(self) -> int:
        return len(self._since)

    def __iter__(self) -> Iterator[S]:
        return iter(list(self._since))

    def __contains__(self, source: S) -> bool:
        return source in self._since

    def add(self, source: S) -> None:
        """Queue a source until it is discarded."""
        self._since[source] = None

    def discard(self, source: S) -> None:
        """Forget a source: finished or cancelled."""
        self._since.pop(source, None)

    def next(self, now: float, accepts: Callable[[Hashable], bool]) -> S | None:
        """The source whose frame goes next, None if there is none; then call `sent`.

        accepts: whether a connection may be sent more. What waits for its own connection does not
        wait for the link, and does not age.
        """
        waiting = []
        for source, since in self._since.items():
            if not source.ready or not accepts(source.connection):
                self._since[source] = None
                continue
            if since is None:
                self._since[source] = since = now
            waiting.append((source, now - since))
        if not waiting:
            return None
        first = min((source for source, _ in waiting), key=lambda s: (s.rank, s.order))
        late = min(
            (source for source, waited in waiting if waited >= self._patience),
            key=lambda s: (s.order, s.rank),
            default=first,
        )
        if late is first:
            self._late, self._debt = False, 0
        else:
            self._late = self._debt > 0
        return late if self._late else first

    def sent(self, num_bytes: int) -> None:
        """A frame of that many bytes was taken from the source that `next` chose."""
        self._debt += -(self._share - 1) * num_bytes if self._late else num_bytes
