# SPDX-License-Identifier: Apache-2.0
"""The consumer's staging memory, counted by both its threads."""

import threading

from lynx_connector.errors import TransferError


class StagingBudget:
    """`limit` bytes for all transfers of a worker. Thread-safe."""

    def __init__(self, limit: int):
        self.limit = limit
        self.used = 0
        self._lock = threading.Lock()

    def take(self, num_bytes: int) -> bool:
        """Count bytes as used, if they fit."""
        with self._lock:
            if self.used + num_bytes > self.limit:
                return False
            self.used += num_bytes
            return True

    def give(self, num_bytes: int) -> None:
        """Count bytes as free."""
        with self._lock:
            self.used -= num_bytes


class Reservation:
    """What one transfer holds of the budget.

    `spare` of its bytes are reserved for frames whose size only the producer knows (raw vectors,
    the exact tier); more are taken as such frames come.
    """

    def __init__(self, budget: StagingBudget, num_bytes: int, spare: int = 0):
        self._budget = budget
        self._held = num_bytes
        self._spare = spare
        self._open = True
        self._lock = threading.Lock()

    @classmethod
    def take(cls, budget: StagingBudget, num_bytes: int, spare: int = 0) -> "Reservation | None":
        """`num_bytes` of the budget, of which `spare` are not used yet; None if they do not fit."""
        return cls(budget, num_bytes, spare) if budget.take(num_bytes) else None

    def use(self, num_bytes: int) -> None:
        """Memory for a frame: spare bytes first, then more of the budget.

        Raises:
            TransferError: there is no room, or the transfer has ended.
        """
        with self._lock:
            more = max(0, num_bytes - self._spare)
            if not self._open:
                raise TransferError("transfer has ended")
            if more and not self._budget.take(more):
                raise TransferError(
                    f"staging is full: {more} bytes needed, {self._budget.used} of "
                    f"{self._budget.limit} in use (staging_bytes)"
                )
            self._held += more
            self._spare += more - num_bytes

    def reuse(self, num_bytes: int) -> None:
        """A frame's memory is free again, for the next ones."""
        with self._lock:
            self._spare += num_bytes

    def close(self) -> None:
        """Give everything back; idempotent."""
        with self._lock:
            if self._open:
                self._open = False
                self._budget.give(self._held)
