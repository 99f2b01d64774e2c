# SPDX-License-Identifier: Apache-2.0
"""Worker half of the consumer: receives tiers into staging and writes them into the paged blocks.

All writes happen inside a step, after its forward pass and on the main thread (vLLM calls
`start_load_kv` there for asynchronous loads: v1/worker/kv_connector_model_runner_mixin.py), so no
forward ever reads a block while it is patched, and blocks freed by an abort are never written.
"""

import logging
import time
from collections import deque

import numpy as np

from lynx_connector.codec import Tier
from lynx_connector.codec.cache import CodecCache
from lynx_connector.codec.table_store import TableStore
from lynx_connector.config import FALLBACK_CODEC, FinalTier
from lynx_connector.consumer.budget import Reservation, StagingBudget
from lynx_connector.consumer.inbound import InboundTransfer, LandedRows
from lynx_connector.consumer.tables import ConsumerTables
from lynx_connector.consumer.writer import TierWriter
from lynx_connector.engine.metadata import (
    LoadRequest,
    LynxMetadata,
    LynxWorkerMetadata,
    ReleaseRequest,
)
from lynx_connector.engine.worker_context import WorkerContext
from lynx_connector.errors import LynxError
from lynx_connector.telemetry.failures import explain
from lynx_connector.tiers.pieces import TierBuffers, TokenRange, plan_pieces, slots_of
from lynx_connector.transport.client import TierClient
from lynx_connector.wire.allowed import AllowedPrefills
from lynx_connector.wire.handoff import TABLE_CODECS

logger = logging.getLogger("vllm.lynx.consumer")

WRITE_SECONDS_PER_STEP = 0.05


class ConsumerWorker:
    """One decode worker's transfers, from fetch to the last patch."""

    def __init__(self, context: WorkerContext):
        config = context.config
        self.rank = context.rank
        self._geometry = context.geometry
        self._block_size = context.block_size
        self._null_block = context.null_block
        self._loop = context.loop
        self._events = context.events
        self._budget = StagingBudget(int(config.staging_bytes))
        store = TableStore(
            config.tables_root(),
            context.tables_key,
            context.rank,
            context.tensor_parallel_size,
            context.geometry,
        )
        self._codecs = CodecCache(context.geometry, context.cache)
        self._tables = ConsumerTables(
            store, context.geometry, lambda new: self._codecs.get(TABLE_CODECS[0], tables=new)
        )
        self._client = TierClient(
            context.identity,
            config.transfer_timeout_seconds,
            self._tables,
            context.events,
            AllowedPrefills(config.allowed_prefills),
        )
        for name in (FALLBACK_CODEC, "bf16"):  # compile before the first request
            self._codecs.get(name)
        self._codecs.compile_ahead()
        self._codecs.compile_exact()
        self._writer = TierWriter(context.cache, self._codecs, self._tables)
        self._active: dict[str, InboundTransfer] = {}
        self._queued: deque[LoadRequest] = deque()
        self._finished_recving: set[str] = set()
        self._failed_recving: set[str] = set()
        self._report = LynxWorkerMetadata()

    # ---- called by the connector, in this order within a step ---------------------------

    def apply_cancellations(self, metadata: LynxMetadata) -> None:
        """Drop transfers that the scheduler gave up, before their blocks can be reused.

        An asynchronous load that has not been reported must still be, or vLLM would keep the
        aborted request's blocks (v1/core/sched/scheduler.py, `_update_from_kv_xfer_finished`).
        """
        for request_id, cause in metadata.cancelled:
            if (transfer := self._active.get(request_id)) is not None:
                self._end(transfer, cause)
                if not transfer.anchor_reported:
                    self._finished_recving.add(request_id)
            elif queued := [load for load in self._queued if load.request_id == request_id]:
                self._queued.remove(queued[0])
                self._release(queued[0], cause)
                self._finished_recving.add(request_id)

    def step(self, metadata: LynxMetadata) -> None:
        """Start new transfers and write what has landed."""
        for hold in metadata.holds:
            if self.rank < len(hold.ports):
                address = (hold.host, hold.ports[self.rank])
                self._loop.post(self._client.hold, address, hold.transfer_id)
        for release in metadata.releases:
            self._release(release, release.cause)
        self._queued.extend(metadata.loads)
        self._start_queued()
        deadline = time.monotonic() + WRITE_SECONDS_PER_STEP
        for transfer in list(self._active.values()):
            self._advance(transfer, deadline)

    def take_finished(self) -> tuple[set[str], set[str]]:
        """(finished_recving, failed_recving) since the last call; failures are in both."""
        finished, self._finished_recving = self._finished_recving, set()
        failed, self._failed_recving = self._failed_recving, set()
        return finished | failed, failed

    def take_report(self) -> LynxWorkerMetadata:
        """What the scheduler half must know beyond vLLM's own fields."""
        report, self._report = self._report, LynxWorkerMetadata()
        return report

    def gauges(self) -> dict[str, float]:
        """Metrics that show how things are now."""
        return {
            "staging_used_bytes": self._budget.used,
            "staging_limit_bytes": self._budget.limit,
            "open_transfers": len(self._active),
            "connections": self._client.num_peers,
        }

    # ---- transfers -------------------------------------------------------------------------

    def _start_queued(self) -> None:
        while self._queued:
            load = self._queued[0]
            if load.failure is not None:
                self._queued.popleft()
                self._fail_load(load, load.failure)
                if load.transfer_id:
                    self._release(load, "consumer cannot load it: " + load.failure)
                continue
            try:
                pieces = plan_pieces(
                    load.num_tokens,
                    load.first_token,
                    load.exact_first,
                    load.exact_last,
                    self._codecs.layout(load.codec, load.anchor_bits),
                    self._codecs.get("bf16"),
                    exact_tier=load.final_tier == FinalTier.EXACT,
                )
                slots = slots_of(
                    TokenRange(load.first_token, load.num_tokens),
                    load.block_ids,
                    load.first_token // self._block_size,
                    self._block_size,
                    self._null_block,
                )
            except LynxError as error:
                self._queued.popleft()
                self._fail_load(load, str(error))
                self._release(load, f"failed: {error}")
                continue
            buffers = TierBuffers(pieces)
            if buffers.num_bytes > self._budget.limit:
                self._queued.popleft()
                self._fail_load(
                    load,
                    f"transfer of {buffers.num_bytes} bytes exceeds this instance's "
                    f"staging_bytes={self._budget.limit}",
                )
                self._release(load, "consumer's staging is too small")
                continue
            size = buffers.num_bytes
            reservation = Reservation.take(self._budget, size, buffers.spare_bytes)
            if reservation is None:
                return  # oldest first: wait until earlier transfers give memory back
            self._queued.popleft()
            self._start(load, buffers, slots, reservation)

    def _start(
        self,
        load: LoadRequest,
        buffers: TierBuffers,
        slots: np.ndarray,
        reservation: Reservation,
    ) -> None:
        buffers.allocate()
        tables = load.tables[self.rank] if load.tables else ""
        transfer = InboundTransfer(load, buffers, slots, self._geometry, reservation, tables)
        self._tables.hold(tables)
        self._active[load.request_id] = transfer
        address = (load.host, load.ports[self.rank])
        self._loop.post(
            self._client.fetch,
            address,
            transfer,
            load.first_token,
            load.num_tokens,
            load.step_ms,
        )

    def _advance(self, transfer: InboundTransfer, deadline: float) -> None:
        failure = transfer.failure
        try:
            ready = failure is None and self._writer.ready(transfer)
            while ready and (rows := transfer.take_landed()):
                self._write(transfer, rows)
                if time.monotonic() > deadline:
                    break
        except LynxError as error:
            failure = str(error)
        if failure is not None:
            self._fail(transfer, failure)
            return
        load = transfer.load
        if (token := transfer.take_first_token()) is not None:
            self._report.first_tokens[load.request_id] = token
        start_on_anchor = load.speculative and transfer.anchored
        if not transfer.anchor_reported and (start_on_anchor or transfer.refined):
            transfer.anchor_reported = True
            self._finished_recving.add(load.request_id)
            if start_on_anchor:
                statistics = transfer.statistics()
                self._report.anchored[load.request_id] = statistics
                self._events("anchor_landed", load.request_id, load.transfer_id, **statistics)
        if transfer.refined:
            self._events("refined", load.request_id, load.transfer_id, **transfer.statistics())
            self._report.refined[load.request_id] = 1
            self._end(transfer, "done")

    def _write(self, transfer: InboundTransfer, rows: LandedRows) -> None:
        began = time.monotonic()
        self._writer.write(transfer, rows)
        tier, tokens = rows.tier, rows.tokens
        load = transfer.load
        self._events(
            "patched" if tier is not Tier.ANCHOR else "frame",
            load.request_id,
            load.transfer_id,
            tier=tier.name.lower(),
            tokens_done=tokens.end,
            seconds=round(time.monotonic() - began, 5),
        )

    # ---- ends --------------------------------------------------------------------------------

    def _fail_load(self, load: LoadRequest, cause: str) -> None:
        if load.failure is None or self.rank == 0:  # all ranks have the scheduler half's
            self._record_failure(load, cause)
        self._failed_recving.add(load.request_id)

    def _record_failure(self, load: LoadRequest, cause: str) -> None:
        """The one log line and event of it."""
        logger.error("lynx: request %s: %s", load.request_id, explain(cause, load.host))
        self._events("failed", load.request_id, load.transfer_id, cause=cause, peer=load.host)

    def _fail(self, transfer: InboundTransfer, cause: str) -> None:
        load = transfer.load
        if transfer.anchor_reported:
            self._record_failure(load, cause)
            self._report.failed[load.request_id] = cause
        else:
            self._fail_load(load, cause)
        self._end(transfer, "failed: " + cause)

    def _end(self, transfer: InboundTransfer, cause: str) -> None:
        del self._active[transfer.load.request_id]
        transfer.reservation.close()
        self._tables.release(transfer.tables)
        self._release(transfer.load, cause)
        self._events(
            "transfer_ended",
            transfer.load.request_id,
            transfer.transfer_id,
            cause=cause,
            staging_bytes=self._budget.used,
        )

    def _release(self, load: LoadRequest | ReleaseRequest, cause: str) -> None:
        if self.rank < len(load.ports):
            address = (load.host, load.ports[self.rank])
            self._loop.post(self._client.release, address, load.transfer_id, cause)
