# SPDX-License-Identifier: Apache-2.0
"""What a producer sends over a connection: tiers of staged transfers, and learned tables."""

import logging
from typing import Protocol

import numpy as np

from lynx_connector.errors import TransferError
from lynx_connector.telemetry.events import EventLog
from lynx_connector.tiers.outbound import TierStream
from lynx_connector.tiers.staging import StagedTransfer, StagingStore
from lynx_connector.transport.connection import Connection, checksum
from lynx_connector.transport.sender import FrameSource, LinkSender, Outgoing
from lynx_connector.wire import messages

logger = logging.getLogger("vllm.lynx.server")

TABLES_RANK = -1
"""Before every tier: without tables no frame can be decoded."""


class Delivery:
    """What one fetch has still to bring; its tiers share it."""

    def __init__(self) -> None:
        self.streams: list[TierStream] = []
        self.in_flight = 0
        """Frames that were taken and that the peer does not have."""

    @property
    def complete(self) -> bool:
        """Whether the peer has every frame."""
        return not self.in_flight and all(stream.finished for stream in self.streams)


class TierSource(FrameSource):
    """One tier of one transfer to one consumer."""

    def __init__(
        self,
        sender: LinkSender,
        store: StagingStore,
        events: EventLog,
        connection: Connection,
        order: int,
        stream: TierStream,
        delivery: Delivery,
    ):
        super().__init__(connection, int(stream.tier), order, stream.transfer.transfer_id)
        self.transfer: StagedTransfer = stream.transfer
        self._sender = sender
        self._store = store
        self._events = events
        self._stream = stream
        self._delivery = delivery
        delivery.streams.append(stream)

    @property
    def ready(self) -> bool:
        """Encoded, and so are the coarser tiers on their way."""
        return self._stream.ready

    @property
    def finished(self) -> bool:
        """As `FrameSource.finished`."""
        return self._stream.finished

    @property
    def dropped(self) -> bool:
        """Whether the transfer ended on this side."""
        return self.transfer.dropped

    def take(self, max_bytes: int) -> Outgoing | None:
        """As `FrameSource.take`; a transfer that was dropped is reported to its consumer."""
        if self.transfer.dropped:
            self._abandon()
            return None
        out = self._stream.take(max_bytes)
        self._delivery.in_flight += 1
        self.transfer.touch()
        header = messages.Frame(
            self.key,
            int(self._stream.tier),
            out.codec,
            out.tokens.start,
            len(out.tokens),
            out.payload.nbytes,
            checksum(out.payload),
            out.exceptions,
        )
        return Outgoing(header, out.payload)

    def failed(self) -> None:
        """As `FrameSource.failed`."""
        self._store.drop(self.key, "prefill could not send its tiers")
        self._abandon()

    def _abandon(self) -> None:
        self._sender.cancel(self.connection, self.key)
        try:
            self._store.lookup(self.key)
        except TransferError as error:
            self.connection.post(messages.Failure(self.key, str(error)))

    def waited(self, out: Outgoing) -> float:
        """As `FrameSource.waited`."""
        return self._stream.waited(self._end_of(out))

    def sent(self, out: Outgoing, waited: float, seconds: float) -> None:
        """As `FrameSource.sent`."""
        self._events(
            "frame_sent",
            self.transfer.request_id,
            self.key,
            tier=self._stream.tier.name.lower(),
            bytes=out.payload.nbytes,
            tokens_done=self._end_of(out),
            queue_seconds=round(waited, 4),
            seconds=round(seconds, 4),
        )
        self._delivery.in_flight -= 1
        if self._delivery.complete:
            self.connection.post(messages.Sent(self.key))

    @staticmethod
    def _end_of(out: Outgoing) -> int:
        assert isinstance(out.header, messages.Frame)
        return out.header.first_token + out.header.num_tokens

    def delivered(self) -> None:
        """As `FrameSource.delivered`."""
        self._events(
            "tier_sent",
            self.transfer.request_id,
            self.key,
            tier=self._stream.tier.name.lower(),
            bytes=self._stream.sent_bytes,
        )


class LearnedTables(Protocol):
    """Tables that can travel."""

    def to_bytes(self) -> bytes: ...


class TablesFinder(Protocol):
    """Where tables are."""

    def find(self, digest: str) -> LearnedTables | None:
        """Tables that a consumer asks for."""


class TablesSource(FrameSource):
    """Learned tables for one consumer, in one frame."""

    def __init__(
        self,
        tables: TablesFinder | None,
        events: EventLog,
        connection: Connection,
        order: int,
        digest: str,
    ):
        super().__init__(connection, TABLES_RANK, order, digest)
        self._tables = tables
        self._events = events
        self._taken = False

    @property
    def ready(self) -> bool:
        """Always."""
        return True

    @property
    def finished(self) -> bool:
        """As `FrameSource.finished`."""
        return self._taken

    def take(self, max_bytes: int) -> Outgoing | None:
        """The tables; where they are not here (any more), the consumer is told."""
        self._taken = True
        tables = self._tables.find(self.key) if self._tables else None
        if tables is None:
            self._tell("prefill does not have these tables (any more)")
            return None
        payload = np.frombuffer(bytearray(tables.to_bytes()), np.uint8)
        peer, size = self.connection.peer, payload.nbytes
        self._events("tables_sent", None, digest=self.key, bytes=size, peer=peer)
        return Outgoing(messages.Tables(self.key, size, checksum(payload)), payload)

    def failed(self) -> None:
        """As `FrameSource.failed`."""
        self._tell("prefill could not send these tables")

    def _tell(self, cause: str) -> None:
        logger.warning("lynx: consumer %s: tables %s: %s", self.connection.peer, self.key, cause)
        self.connection.post(messages.NoTables(self.key, cause))

    def waited(self, out: Outgoing) -> float:
        """Tables are not encoded: they can go when they are asked for."""
        return 0.0

    def sent(self, out: Outgoing, waited: float, seconds: float) -> None:
        """Nothing to report."""

    def delivered(self) -> None:
        """Nothing to report."""
