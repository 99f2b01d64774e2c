# SPDX-License-Identifier: Apache-2.0
"""Decodes that came in one HTTP request (n > 1, a list of prompts) with one transfer: who loads it.

Pure Python; runs without torch.
"""

import enum
import time
from collections.abc import Iterator

from lynx_connector.engine.requests import member
from lynx_connector.errors import ProtocolError
from lynx_connector.wire.handoff import Handoff

CLAIM_SECONDS = 2.0
"""How long a handoff of another prompt waits for the one of a list that it belongs to."""


class Role(enum.Enum):
    """What a request does with the transfer that it names."""

    LOADS = enum.auto()
    FOLLOWS = enum.auto()
    """It waits for a request of the same prompt, whose blocks it finds in the prefix cache."""
    COMPUTES = enum.auto()
    """Another prompt of the list has it."""


class Siblings:
    """The one request that loads each transfer, and those that came with it."""

    def __init__(self) -> None:
        self._users: dict[str, str] = {}
        """Request by transfer, by the producer's name of it, or the router's."""
        self._firsts: dict[str, str] = {}
        """Whom a request follows."""
        self._unclaimed: dict[str, tuple[Handoff, float]] = {}
        """Handoffs of another prompt than the request's that came with them, and since when: of a
        list of prompts, another one may need them."""

    def role(self, request_id: str, transfer_id: str) -> Role:
        """What a request is to do; `claim` follows where it loads.

        Raises:
            ProtocolError: a stranger loads the transfer.
        """
        user = self._users.get(transfer_id)
        if user is None:
            return Role.LOADS
        ours, theirs = member(request_id), member(user)
        if ours.family != theirs.family:
            raise ProtocolError(f"transfer is already used by request {user}")
        if ours.prompt != theirs.prompt:
            return Role.COMPUTES
        self._firsts[request_id] = user
        return Role.FOLLOWS

    def claim(self, request_id: str, transfer_id: str) -> None:
        """The request loads the transfer."""
        self._users[transfer_id] = request_id
        self._unclaimed.pop(transfer_id, None)

    def first(self, request_id: str) -> str | None:
        """The request that this one follows."""
        return self._firsts.get(request_id)

    def leave(self, request_id: str) -> None:
        """A request follows nobody any more, and has ended."""
        self._firsts.pop(request_id, None)
        for name in [name for name, user in self._users.items() if user == request_id]:
            del self._users[name]

    # ---- handoffs of another prompt ---------------------------------------------------------

    def offer(self, handoff: Handoff) -> None:
        """A handoff is not of the prompt of the request that brought it."""
        self._unclaimed[handoff.transfer_id] = handoff, time.monotonic()

    @property
    def has_offers(self) -> bool:
        """Whether any handoff waits to be claimed."""
        return bool(self._unclaimed)

    def unwanted(self) -> Iterator[Handoff]:
        """Handoffs that nobody has claimed in time."""
        now = time.monotonic()
        late = [name for name, (_, since) in self._unclaimed.items() if now - since > CLAIM_SECONDS]
        return (self._unclaimed.pop(name)[0] for name in late)
