# SPDX-License-Identifier: Apache-2.0
"""Encoded tiers in bounded host memory, from a prefill's first chunk to the consumer's release."""

import threading
import time

from lynx_connector.codec import KltTables
from lynx_connector.errors import TransferError
from lynx_connector.lifecycle.transfer import WHOLE, TransferEvent, transfer_life
from lynx_connector.telemetry.events import EventLog
from lynx_connector.tiers.pieces import TierBuffers
from lynx_connector.wire.messages import Prefilled


class StagedTransfer:
    """One request's tiers. Rows of tokens below `encoded`, which grows with the prefill, are
    final. `StagingStore` moves its `life`, under its lock."""

    def __init__(
        self,
        transfer_id: str,
        request_id: str,
        num_tokens: int,
        buffers: TierBuffers,
        tables: KltTables | None = None,
    ):
        self.transfer_id = transfer_id
        self.request_id = request_id
        self.num_tokens = num_tokens
        self.buffers = buffers
        self.tables = tables
        """What its codec was learned from; held until no consumer can ask for them any more."""
        self.num_bytes = buffers.num_bytes
        self.encoded = 0
        self.ready_since: list[tuple[int, float]] = []
        """(tokens encoded, time.monotonic() then), for how long frames wait to be sent."""
        self.life = transfer_life()
        self.outcome: Prefilled | None = None
        """How its prefill ended, where the router had its reply before."""
        self._touched = time.monotonic()

    @property
    def dropped(self) -> bool:
        """Whether it has ended: nothing of it may be encoded or sent any more."""
        return self.life.over

    def encoded_at(self, tokens: int) -> float:
        """When the first `tokens` tokens were encoded (time.monotonic())."""
        return next((at for encoded, at in self.ready_since if encoded >= tokens), 0.0)

    def touch(self) -> None:
        """Contact with a consumer: the lease starts anew."""
        self._touched = time.monotonic()

    def expired(self, lease_seconds: float, now: float) -> bool:
        """Whether a whole transfer has had no contact for the lease."""
        return self.life.state in WHOLE and now - self._touched > lease_seconds


class StagingStore:
    """All transfers of this worker, within `limit_bytes`. Thread-safe.

    A transfer that found no room, or that ended, leaves its cause behind for a while, so that a
    consumer that asks for it learns why.
    """

    MAX_CAUSES = 1024

    def __init__(self, limit_bytes: int, lease_seconds: float, events: EventLog):
        self._limit = limit_bytes
        self._lease = lease_seconds
        self._events = events
        self._lock = threading.Lock()
        self._transfers: dict[str, StagedTransfer] = {}
        self._causes: dict[str, str] = {}
        self._unwanted: set[str] = set()
        self._ended: set[str] = set()
        self.used_bytes = 0

    def __len__(self) -> int:
        return len(self._transfers)

    def open(self, transfer: StagedTransfer) -> bool:
        """Take memory for a transfer; False (and a cause for the consumer) if there is no room."""
        with self._lock:
            if self.used_bytes + transfer.num_bytes > self._limit:
                self._refuse(transfer, self._full(transfer.num_bytes))
                return False
            self.used_bytes += transfer.num_bytes
            self._transfers[transfer.transfer_id] = transfer
        transfer.buffers.allocate()
        return True

    def refuse(self, transfer: StagedTransfer, cause: str) -> None:
        """Remember why a transfer cannot be staged at all."""
        with self._lock:
            self._refuse(transfer, cause)

    def _refuse(self, transfer: StagedTransfer, cause: str) -> None:
        self._remember(transfer.transfer_id, cause)
        self._ended.add(transfer.transfer_id)
        transfer.life.on(TransferEvent.DROP)
        self._events("refused", transfer.request_id, transfer.transfer_id, cause=cause)

    def settle(self, outcome: Prefilled) -> None:
        """The prefill of a transfer that was answered early has ended; a failed one is dropped."""
        with self._lock:
            transfer = self._transfers.get(outcome.transfer_id)
            if transfer is not None:
                transfer.outcome = outcome
            elif outcome.cause and outcome.transfer_id not in self._causes:
                self._remember(outcome.transfer_id, outcome.cause)
        if outcome.cause:
            self.drop(outcome.transfer_id, outcome.cause)

    def advance(self, transfer: StagedTransfer, encoded: int) -> bool:
        """Rows of tokens below `encoded` are final, and count with their true size.

        False: the transfer has ended, or ends here with its cause, for want of room.
        """
        num_bytes = transfer.buffers.num_bytes
        with self._lock:
            if transfer.dropped:
                return False
            growth = num_bytes - transfer.num_bytes
            if growth <= 0 or self.used_bytes + growth <= self._limit:
                self.used_bytes += growth
                transfer.num_bytes = num_bytes
                transfer.touch()
                transfer.ready_since.append((encoded, time.monotonic()))
                transfer.encoded = encoded
                if encoded == transfer.num_tokens:
                    transfer.life.on(TransferEvent.COMPLETE)
                return True
            cause = self._full(growth)
        self.drop(transfer.transfer_id, cause)
        return False

    def find_tables(self, digest: str) -> KltTables | None:
        """Tables that an open transfer was encoded with."""
        with self._lock:
            found = (t.tables for t in self._transfers.values() if t.tables is not None)
            return next((tables for tables in found if tables.digest == digest), None)

    def _full(self, needed: int) -> str:
        return (
            f"prefill's staging is full: {needed} bytes needed, "
            f"{self.used_bytes} of {self._limit} in use (staging_bytes)"
        )

    def lookup(self, transfer_id: str) -> StagedTransfer:
        """The transfer, if it is still here.

        Raises:
            TransferError: with the reason why it is not.
        """
        with self._lock:
            transfer = self._transfers.get(transfer_id)
            if transfer is None:
                raise TransferError(self._causes.get(transfer_id, "unknown transfer"))
            return transfer

    def fetch(self, transfer_id: str, first_token: int, num_tokens: int) -> StagedTransfer:
        """The transfer, for a consumer that wants tokens [first_token, num_tokens) of it.

        Raises:
            TransferError: it is not here, or another one was meant.
        """
        transfer = self.lookup(transfer_id)
        if num_tokens != transfer.num_tokens or first_token >= num_tokens:
            raise TransferError(
                f"asked for tokens {first_token} to {num_tokens} of a transfer with "
                f"{transfer.num_tokens}"
            )
        with self._lock:
            if not transfer.dropped:  # else its streams say so
                transfer.life.on(TransferEvent.FETCH)
        transfer.touch()
        return transfer

    def touch(self, transfer_id: str) -> None:
        """A consumer says that it will come for a transfer."""
        with self._lock:
            transfer = self._transfers.get(transfer_id)
        if transfer is not None:
            transfer.touch()

    def drop(
        self, transfer_id: str, cause: str, event: TransferEvent = TransferEvent.DROP
    ) -> StagedTransfer | None:
        """Forget a transfer and give its memory back; None if it was not here."""
        with self._lock:
            transfer = self._transfers.pop(transfer_id, None)
            if transfer is None:
                return None
            transfer.life.on(event)
            self._ended.add(transfer_id)
            self.used_bytes -= transfer.num_bytes
            left = self.used_bytes
            self._remember(transfer_id, f"transfer was released: {cause}")
        self._events(
            "released",
            transfer.request_id,
            transfer_id,
            cause=cause,
            bytes=transfer.num_bytes,
            staging_bytes=left,
        )
        return transfer

    def release(self, transfer_id: str, cause: str) -> None:
        """The consumer needs a transfer no more; its prefill may still run."""
        transfer = self.drop(transfer_id, cause)
        if transfer is not None and transfer.encoded < transfer.num_tokens:
            with self._lock:
                self._unwanted.add(transfer.request_id)

    def take_unwanted(self) -> set[str]:
        """Requests whose transfer was released before it was whole, since the last call."""
        with self._lock:
            unwanted, self._unwanted = self._unwanted, set()
        return unwanted

    def take_ended(self) -> set[str]:
        """Transfers that were refused or dropped, since the last call."""
        with self._lock:
            ended, self._ended = self._ended, set()
        return ended

    def expire(self) -> list[StagedTransfer]:
        """Drop every complete transfer whose lease has run out, and return them."""
        now = time.monotonic()
        with self._lock:
            late = [t for t in self._transfers.values() if t.expired(self._lease, now)]
        cause = f"no consumer within lease_seconds={self._lease:g}"
        dropped = [self.drop(t.transfer_id, cause, TransferEvent.EXPIRE) for t in late]
        return [transfer for transfer in dropped if transfer is not None]

    def _remember(self, transfer_id: str, cause: str) -> None:
        self._causes[transfer_id] = cause
        while len(self._causes) > self.MAX_CAUSES:
            del self._causes[next(iter(self._causes))]
