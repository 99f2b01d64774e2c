# SPDX-License-Identifier: Apache-2.0
"""Bounds the KV blocks held by requests whose prefill still runs elsewhere.

Such a request holds the blocks of its whole prompt and computes nothing, for as long as its prefill
takes. Beyond a number of tokens further ones wait without blocks, first come, first served.
"""


class WaitingRoom:
    """Who holds blocks and who waits for room, by request id.

    Args:
        limit_tokens: most tokens held at a time; one request may always enter an empty room.
    """

    def __init__(self, limit_tokens: int):
        self._limit = limit_tokens
        self._inside: dict[str, int] = {}
        self._outside: dict[str, None] = {}

    def has_room(self, request_id: str, tokens: int) -> bool:
        """Whether a request may enter now; else it has its place in the queue."""
        first = next(iter(self._outside), request_id)
        held = sum(self._inside.values())
        if first == request_id and (not held or held + tokens <= self._limit):
            return True
        self._outside.setdefault(request_id)
        return False

    def enter(self, request_id: str, tokens: int) -> None:
        """Its blocks are allocated."""
        self._outside.pop(request_id, None)
        self._inside[request_id] = tokens

    def leave(self, request_id: str) -> None:
        """Its anchor has landed, or it waits no more."""
        self._outside.pop(request_id, None)
        self._inside.pop(request_id, None)
