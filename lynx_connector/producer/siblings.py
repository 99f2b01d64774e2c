# SPDX-License-Identifier: Apache-2.0
"""Prefills that came in one HTTP request (n > 1, a list of prompts): one transfer, one reply.

Pure Python; runs without torch.
"""

from collections import OrderedDict
from typing import Any

from lynx_connector.engine.requests import is_extra, member

MAX_KEPT = 1024
"""Replies kept for the others of n."""


class Siblings:
    """Which requests of a prefill leg hand over nothing themselves, and what they reply."""

    def __init__(self) -> None:
        self._extras: dict[str, tuple[str, int]] = {}
        """Requests whose transfers nobody could fetch: family and prompt by request id."""
        self._replies: OrderedDict[tuple[str, int], dict[str, Any]] = OrderedDict()
        """What the first of n replied, since the last one's reply is the one that is sent."""

    def add(self, request_id: str) -> bool:
        """Whether this new request hands over nothing."""
        if extra := is_extra(request_id):
            self._extras[request_id] = member(request_id)[:2]
        return extra

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._extras

    def publish(self, request_id: str, reply: dict[str, Any]) -> None:
        """What a request replies that hands over for itself and its siblings."""
        place = member(request_id)
        if place.child is None:
            return
        self._replies[place[:2]] = reply
        while len(self._replies) > MAX_KEPT:
            self._replies.popitem(last=False)

    def finish(self, request_id: str) -> dict[str, Any] | None:
        """The reply of a request that hands over nothing, at its end."""
        family, prompt = self._extras.pop(request_id)
        return self._replies.get((family, prompt)) if prompt == 0 else None
