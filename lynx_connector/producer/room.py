# SPDX-License-Identifier: Apache-2.0
"""Prefills wait for room in staging before they start, instead of failing for want of it later.

How much a transfer takes is known beforehand. The scheduler half keeps account: a transfer is
inside from its admission until every worker has dropped it, as workers report. Pure Python.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from lynx_connector.tiers.waiting import WaitingRoom


@dataclass
class _Entry:
    asked: float
    ranks_left: int
    admitted: bool = False


@dataclass
class StagingRoom:
    """Which transfers may be staged.

    limit_bytes: `staging_bytes` of one worker. ranks: workers that stage each transfer. After
    `wait_seconds` a prefill goes on without room: its decode instance will be told why.
    """

    limit_bytes: int
    ranks: int
    wait_seconds: float
    _entries: dict[str, _Entry] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._room = WaitingRoom(self.limit_bytes)

    def admit(self, transfer_id: str, num_bytes: int) -> float | None:
        """Seconds for which the transfer has waited, once it may start; None: not yet.

        Larger than all of staging, it does not wait: there will never be room.
        """
        now = time.monotonic()
        entry = self._entries.setdefault(transfer_id, _Entry(now, self.ranks))
        waited = now - entry.asked
        if entry.admitted:
            return waited
        fits = num_bytes > self.limit_bytes or self._room.has_room(transfer_id, num_bytes)
        if not fits and waited < self.wait_seconds:
            return None
        entry.admitted = True
        self._room.enter(transfer_id, num_bytes)
        return waited

    def dropped(self, ranks: Mapping[str, int]) -> None:
        """Transfers that workers have dropped, each with how many did."""
        for transfer_id, count in ranks.items():
            if (entry := self._entries.get(transfer_id)) is not None:
                entry.ranks_left -= count
                if entry.ranks_left <= 0:
                    self.leave(transfer_id)

    def leave(self, transfer_id: str) -> None:
        """No worker knows the transfer (any more)."""
        self._entries.pop(transfer_id, None)
        self._room.leave(transfer_id)

    @property
    def held_bytes(self) -> int:
        """What is staged or about to be."""
        return self._room.held

    @property
    def num_waiting(self) -> int:
        """Prefills that wait for room."""
        return self._room.num_waiting

    def __len__(self) -> int:
        """Transfers admitted, or waiting."""
        return len(self._entries)
