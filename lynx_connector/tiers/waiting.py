# SPDX-License-Identifier: Apache-2.0
"""A bound on what is held at a time, first come, first served.

On the decode side it bounds the KV blocks of requests whose prefill still runs elsewhere: they hold
the blocks of their whole prompt and compute nothing. On the prefill side it bounds staging.
"""


class WaitingRoom:
    """Who is inside and who waits for room, by name.

    Args:
        limit: most that is held at a time, in any unit; one may always enter an empty room.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._inside: dict[str, int] = {}
        self._outside: dict[str, None] = {}

    def has_room(self, name: str, amount: int) -> bool:
        """Whether it may enter now; else it has its place in the queue."""
        first = next(iter(self._outside), name)
        held = self.held
        if first == name and (not held or held + amount <= self._limit):
            return True
        self._outside.setdefault(name)
        return False

    def enter(self, name: str, amount: int) -> None:
        """It holds `amount` from now on."""
        self._outside.pop(name, None)
        self._inside[name] = amount

    def leave(self, name: str) -> None:
        """It holds nothing, and does not want to."""
        self._outside.pop(name, None)
        self._inside.pop(name, None)

    @property
    def held(self) -> int:
        """What those inside hold."""
        return sum(self._inside.values())

    @property
    def num_waiting(self) -> int:
        """How many wait."""
        return len(self._outside)
