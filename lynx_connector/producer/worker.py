# SPDX-License-Identifier: Apache-2.0
"""Worker half of the producer: encodes finished blocks into staging, off the critical path.

A thread of its own encodes while the next chunk is computed. Blocks of a finished chunk are not
written again, so it reads them without a lock; blocks taken away by a preemption are waited for.
"""

import logging
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lynx_connector.codec import CodecError, KltTables
from lynx_connector.codec.cache import CodecCache
from lynx_connector.codec.exact import ExactTier
from lynx_connector.codec.streams import SideStream
from lynx_connector.codec.table_store import TableStore
from lynx_connector.config import EXACT_FIRST_TOKENS, FALLBACK_CODEC, FinalTier
from lynx_connector.engine.metadata import EncodeChunk, LynxMetadata
from lynx_connector.engine.worker_context import WorkerContext
from lynx_connector.errors import TransferError
from lynx_connector.producer.encoder import ChunkEncoder
from lynx_connector.producer.learning import OnlineLearning, start_learning
from lynx_connector.producer.queries import QuerySample, QuerySampler
from lynx_connector.producer.reuse import ChunkBlock, EncodedBlocks, ReusingEncoder
from lynx_connector.producer.tables import ProducerTables
from lynx_connector.tiers.pieces import TierBuffers, TokenRange, plan_pieces, slots_of
from lynx_connector.tiers.staging import StagedTransfer, StagingStore
from lynx_connector.transport.server import TierServer
from lynx_connector.wire.handoff import TABLE_CODECS
from lynx_connector.wire.messages import MAX_CAUSE, Prefilled

logger = logging.getLogger("vllm.lynx.producer")

ENCODE_TOKENS = 1024
"""Most tokens that are encoded before they may be sent."""


@dataclass
class _Job:
    transfer: StagedTransfer
    chunk: EncodeChunk
    tokens: TokenRange
    slots: np.ndarray
    queries: QuerySample | None
    """Of the whole step, with its first job."""
    ready: object | None
    """What `SideStream.record` returned after the chunk's forward pass."""

    def slots_of(self, tokens: TokenRange) -> np.ndarray:
        """Slots of a part of the job's tokens."""
        return self.slots[tokens.start - self.tokens.start : tokens.end - self.tokens.start]


class ProducerWorker:
    """One prefill worker's encoder, staging and server."""

    def __init__(self, context: WorkerContext):
        self._config = config = context.config
        self._cache = context.cache
        self._stream = SideStream(context.cache.device)
        self._block_size = context.block_size
        self._null_block = context.null_block
        self._loop = context.loop
        self._events = context.events
        self.rank = context.rank
        self._codecs = CodecCache(context.geometry, context.cache)
        self._exact = self._codecs.get("bf16")
        learns = config.codec in TABLE_CODECS
        codec = self._codecs.get(FALLBACK_CODEC if learns else config.codec)
        if config.final_tier is FinalTier.EXACT and len(codec.tiers) > 1:
            ExactTier(codec)  # refuses here what it cannot do
            self._codecs.compile_exact()
        self._tables = ProducerTables(
            TableStore(
                config.tables_root(),
                context.tables_key,
                context.rank,
                context.tensor_parallel_size,
                context.geometry,
            )
        )
        if learns:
            self._codecs.compile_ahead()
            self._compile_stored_tables()
        self._learning = start_learning(context, self._tables, self._codecs) if learns else None
        self._sampler: QuerySampler | None = None
        if self._learning is not None and context.tap_queries is not None:
            self._sampler = QuerySampler(
                context.geometry.num_layers, context.block_size, context.tap_queries
            )
        self._kept = EncodedBlocks(int(config.reuse_bytes))
        chunks = ChunkEncoder(context.cache, context.geometry)
        self._chunks = ReusingEncoder(
            chunks, context.cache, self._exact, context.block_size, self._kept
        )
        self._store = StagingStore(int(config.staging_bytes), config.lease_seconds, self._events)
        self._server = TierServer(
            self._store,
            context.identity,
            self._events,
            int(config.frame_bytes),
            config.link_mbit,
            self if learns else None,
            config.data_ports or "",
        )
        port = config.listen_port + context.port_offset if config.listen_port else 0
        self._loop.run(self._server.start(port, config.listens_on()))
        self._reported_mbit = self._reported_step_ms = 0.0
        self._transfers: dict[str, StagedTransfer] = {}
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._pending: dict[str, int] = {}
        self._pending_changed = threading.Condition()
        self._finished: set[str] = set()
        self._encoder = threading.Thread(target=self._encode_loop, name="lynx-encode", daemon=True)
        self._encoder.start()
        logger.info(
            "lynx: serving tiers on port %d (codec %s, final tier %s, staging %d bytes, "
            "compatibility %s)",
            self.port,
            config.codec,
            config.final_tier.value,
            config.staging_bytes,
            context.identity.compat,
        )

    @property
    def port(self) -> int:
        """Where this rank listens."""
        return self._server.port

    def _compile_stored_tables(self) -> None:
        digest = self._tables.current
        try:
            if tables := self._tables.find(digest):
                self._codecs.get(self._config.codec, self._config.anchor_bits, tables)
        except CodecError as error:
            logger.warning("lynx: stored tables %s are not usable: %s", digest, error)
            self._tables.forget(digest)

    # ---- learned tables -----------------------------------------------------------------

    @property
    def current(self) -> str:
        """Digest of the tables that new requests may use; empty while there are none."""
        return self._tables.current if self._config.codec in TABLE_CODECS else ""

    def find(self, digest: str) -> KltTables | None:
        """Tables that a consumer may still ask for."""
        return self._tables.find(digest) or self._store.find_tables(digest)

    def take_report(self) -> dict[int, str]:
        """This rank's newest digest, if it is new; else empty."""
        digest = self._tables.take_report()
        return {} if digest is None else {self.rank: digest}

    def gauges(self) -> dict[str, float]:
        """Metrics that show how things are now."""
        return {
            "staging_used_bytes": self._store.used_bytes,
            "staging_limit_bytes": int(self._config.staging_bytes),
            "reuse_used_bytes": self._kept.used_bytes,
            "open_transfers": len(self._store),
            "connections": self._server.num_sessions,
            "link_mbit": self._server.rates.mbit,
        }

    # ---- what the plan needs --------------------------------------------------------------

    def take_measured(self) -> tuple[dict[int, float], dict[int, float]]:
        """(Mbit/s of this rank's link, ms of a decode step) by rank; empty where unchanged."""
        mbit, step_ms = self._server.rates.mbit, self._server.step_ms
        link, step = {}, {}
        if _changed(self._reported_mbit, mbit):
            self._reported_mbit = link[self.rank] = mbit
        if _changed(self._reported_step_ms, step_ms):
            self._reported_step_ms = step[self.rank] = step_ms
        return link, step

    def take_unwanted(self) -> set[str]:
        """Requests that their consumer gave up while they run."""
        return self._store.take_unwanted()

    def take_dropped(self) -> dict[str, int]:
        """Transfers of which this rank holds nothing any more."""
        return dict.fromkeys(self._store.take_ended(), 1)

    # ---- called by the connector within a step ------------------------------------------

    def apply_drops(self, metadata: LynxMetadata) -> None:
        """Before the step: stop reading blocks that are being taken away, and pass on outcomes."""
        for outcome in metadata.outcomes:
            self.set_outcome(outcome.transfer_id, outcome.first_token, outcome.cause)
        for request_id in metadata.dropped:
            if transfer := self._transfers.get(request_id):
                self._store.drop(transfer.transfer_id, "request ended before its prefill did")
        for request_id in metadata.preempted & self._transfers.keys():
            self._wait_idle(request_id)  # the encoder reads its blocks
        if metadata.dropped:
            self._loop.post(self._server.notify)  # consumers that wait hear of it

    def set_outcome(self, transfer_id: str, first_token: int | None, cause: str = "") -> None:
        """How a prefill ended whose router had its reply before; its consumer is told.

        Rank 0 alone carries the token, every rank a failure. Later calls for the same transfer,
        and calls for one that was released, change nothing.
        """
        if self.rank and not cause:
            return
        self._store.settle(Prefilled(transfer_id, first_token, cause[:MAX_CAUSE]))
        self._loop.post(self._server.notify)

    def expect(self, metadata: LynxMetadata) -> None:
        """Before the step's forward pass: keep some of its queries while there is learning."""
        if self._sampler is None:
            return
        if self._learning is None or not self._learning.active:
            self._sampler.close()
            self._sampler = None
        else:
            self._sampler.expect(metadata.encode)

    def submit(self, metadata: LynxMetadata) -> None:
        """After the step's forward pass: queue its finished chunks."""
        if not metadata.encode:
            return
        queries = self._sampler.take() if self._sampler is not None else None
        ready = self._stream.record()
        for chunk in metadata.encode:
            transfer = self._transfers.get(chunk.request_id) or self._open(chunk)
            if transfer.dropped:
                continue
            tokens = TokenRange(chunk.start, chunk.end)
            first_block = chunk.start // self._block_size
            try:
                slots = slots_of(
                    tokens, chunk.block_ids, first_block, self._block_size, self._null_block
                )
            except TransferError as error:
                logger.error("lynx: request %s: %s", chunk.request_id, error)
                self._store.drop(transfer.transfer_id, f"prefill could not encode: {error}")
                self._loop.post(self._server.notify)
                continue
            with self._pending_changed:
                self._pending[chunk.request_id] = self._pending.get(chunk.request_id, 0) + 1
            self._jobs.put(_Job(transfer, chunk, tokens, slots, queries, ready))
            queries = None

    def take_finished(self, finished_request_ids: set[str]) -> set[str]:
        """Finished requests whose blocks are not read any more (vLLM then frees them)."""
        self._finished |= finished_request_ids & self._transfers.keys()
        with self._pending_changed:
            done = {request for request in self._finished if request not in self._pending}
        self._finished -= done
        for request in done:
            del self._transfers[request]
        return done

    # ---- encoding -------------------------------------------------------------------------

    def _open(self, chunk: EncodeChunk) -> StagedTransfer:
        plan = chunk.plan
        cause = None
        tables = self.find(plan.tables[self.rank]) if plan.tables else None
        try:
            codec = self._codecs.get(plan.codec, plan.anchor_bits, tables)
        except CodecError as error:
            # Tables that the scheduler half chose are gone, or do not fit: the consumer is told.
            cause, codec = f"prefill cannot encode: {error}", self._exact
        pieces = plan_pieces(
            chunk.num_tokens,
            0,
            EXACT_FIRST_TOKENS,
            self._config.exact_last_tokens,
            codec,
            self._exact,
            exact_tier=plan.final_tier == FinalTier.EXACT,
        )
        transfer = StagedTransfer(
            chunk.transfer_id, chunk.request_id, chunk.num_tokens, TierBuffers(pieces), tables
        )
        self._transfers[chunk.request_id] = transfer
        if cause is not None:
            self._store.refuse(transfer, cause)
            logger.error("lynx: request %s: %s", chunk.request_id, cause)
        elif not self._store.open(transfer):
            self._log_full(transfer)
        return transfer

    def _log_full(self, transfer: StagedTransfer) -> None:
        logger.warning(
            "lynx: request %s: no room in staging for %d bytes (%d of %d in use); its decode "
            "instance will be told",
            transfer.request_id,
            transfer.buffers.num_bytes,
            self._store.used_bytes,
            self._config.staging_bytes,
        )

    def _encode_loop(self) -> None:
        while (job := self._jobs.get()) is not None:
            transfer = job.transfer
            try:
                self._encode(job)
            except Exception:
                logger.exception("lynx: request %s: encoding failed", transfer.request_id)
                self._store.drop(transfer.transfer_id, "prefill could not encode its KV")
            finally:
                with self._pending_changed:
                    self._pending[transfer.request_id] -= 1
                    if not self._pending[transfer.request_id]:
                        del self._pending[transfer.request_id]
                    self._pending_changed.notify_all()
            if self._learning is not None:
                self._learning.build_if_due()
            self._loop.post(self._server.notify)

    def _encode(self, job: _Job) -> None:
        transfer = job.transfer
        began = time.monotonic()
        blocks: list[ChunkBlock] = []
        for part in self._parts(job.tokens):
            with self._stream.after(job.ready):
                for piece, tokens in transfer.buffers.overlapping(part):
                    if transfer.dropped:
                        return
                    blocks += self._chunks.encode(piece, tokens, job.slots_of(tokens), job.chunk)
            ended = transfer.dropped
            if not self._store.advance(transfer, part.end):
                if not ended:
                    self._log_full(transfer)
                return
            self._loop.post(self._server.notify)
        self._events(
            "chunk_encoded",
            transfer.request_id,
            transfer.transfer_id,
            tokens_done=job.tokens.end,
            tokens=len(job.tokens),
            reused=sum(len(block.tokens) for block in blocks if block.kept is not None),
            seconds=round(time.monotonic() - began, 4),
        )
        self._chunks.keep(blocks)  # like learning, behind what the consumer waits for
        if self._learning is not None and self._learning.active:
            self._learn(job, self._learning)

    def _parts(self, tokens: TokenRange) -> Iterator[TokenRange]:
        """A chunk in parts that are sent as they are encoded: a prefix-cached prompt is one chunk,
        however long it is. Between blocks, so that each can be reused."""
        start, step = tokens.start, max(ENCODE_TOKENS // self._block_size, 1)
        while start < tokens.end:
            end = min((start // self._block_size + step) * self._block_size, tokens.end)
            yield TokenRange(start, end)
            start = end

    def _learn(self, job: _Job, learning: OnlineLearning) -> None:
        """Behind the chunk's rows, so that the consumer does not wait for it."""
        # Tokens of the prefix cache were seen before: they teach nothing new.
        unseen = TokenRange(max(job.tokens.start, job.chunk.fresh), job.tokens.end)
        with self._stream.after(job.ready):
            for piece, tokens in job.transfer.buffers.overlapping(unseen):
                if piece.codec is not self._exact:
                    learning.observe(self._cache, job.slots_of(tokens), tokens.start)
            if job.queries is not None:
                learning.observe_queries(job.queries)

    def _wait_idle(self, request_id: str) -> None:
        with self._pending_changed:
            self._pending_changed.wait_for(lambda: request_id not in self._pending)

    def stop(self) -> None:
        """End the encoder and the listener."""
        self._jobs.put(None)
        self._encoder.join(timeout=5.0)
        if self._learning is not None:
            self._learning.stop()
        self._loop.run(self._server.stop(), timeout=5.0)


def _changed(reported: float, now: float) -> bool:
    """Whether a measurement is known and differs by more than 2 % from what was reported."""
    return now > 0 and abs(now - reported) > 0.02 * reported
