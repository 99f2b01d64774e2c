# SPDX-License-Identifier: Apache-2.0
"""Decodes of one HTTP request with n > 1: one of them loads the transfer that all of them name.

Pure Python; runs without torch.
"""

from lynx_connector.engine.requests import member
from lynx_connector.errors import ProtocolError


class Siblings:
    """The request that loads each transfer, and those that find its prompt in the prefix cache."""

    def __init__(self) -> None:
        self._users: dict[str, str] = {}
        """Request by transfer, by the producer's name of it, or the router's."""
        self._firsts: dict[str, str] = {}
        """Whom a request follows."""

    def loads_itself(self, request_id: str, transfer_id: str) -> bool:
        """Whether a request is to load a transfer: `claim` is next. False: it follows another one.

        A follower does without the handoff, so that giving up does not take it from its user.

        Raises:
            ProtocolError: another client's request loads the transfer.
        """
        user = self._users.get(transfer_id)
        if user is None:
            return True
        if member(request_id)[:2] != member(user)[:2]:
            raise ProtocolError(f"transfer is already used by request {user}")
        self._firsts[request_id] = user
        return False

    def claim(self, request_id: str, transfer_id: str) -> None:
        """The request loads the transfer."""
        self._users[transfer_id] = request_id

    def is_used(self, transfer_id: str) -> bool:
        """Whether a request loads the transfer."""
        return transfer_id in self._users

    def first(self, request_id: str) -> str | None:
        """The request that this one follows."""
        return self._firsts.get(request_id)

    def leave(self, request_id: str) -> None:
        """A request has ended."""
        self._firsts.pop(request_id, None)
        for name in [name for name, user in self._users.items() if user == request_id]:
            del self._users[name]
