# SPDX-License-Identifier: Apache-2.0
"""Worker half of the producer: encodes finished blocks into staging, off the critical path.

A thread of its own encodes while the next chunk is computed. Blocks of a finished chunk are not
written again, so it reads them without a lock; blocks taken away by a preemption are waited for.
"""

import logging
import queue
import threading
import time
from dataclasses import dataclass

import numpy as np

from lynx_connector.codec import Codec, Tier, get_codec
from lynx_connector.config import EXACT_FIRST_TOKENS
from lynx_connector.metadata import EncodeChunk, LynxMetadata
from lynx_connector.producer.staging import StagedTransfer, StagingStore
from lynx_connector.streams import SideStream
from lynx_connector.transfer import TierBuffers, TokenRange, plan_pieces, slots_of
from lynx_connector.transport.server import TierServer
from lynx_connector.worker_context import WorkerContext

logger = logging.getLogger("vllm.lynx.producer")


@dataclass
class _Job:
    transfer: StagedTransfer
    tokens: TokenRange
    slots: np.ndarray
    restarts: int
    """Value of `transfer.restarts` when the job was queued; a later one makes the job void."""
    ready: object | None
    """What `SideStream.record` returned after the chunk's forward pass."""


class ProducerWorker:
    """One prefill worker's encoder, staging and server."""

    def __init__(self, context: WorkerContext):
        self._config = config = context.config
        self._cache = context.cache
        self._stream = SideStream(context.cache.device)
        self._block_size = context.block_size
        self._loop = context.loop
        self._events = context.events
        self._codec: Codec = get_codec(config.codec, context.geometry)
        self._exact: Codec = get_codec("bf16", context.geometry)
        for codec in (self._codec, self._exact):
            codec.warmup()
        self._store = StagingStore(int(config.staging_bytes), config.lease_seconds, self._events)
        self._server = TierServer(
            self._store, context.identity, self._events, int(config.frame_bytes), config.link_mbit
        )
        port = config.listen_port + context.rank if config.listen_port else 0
        self._loop.run(self._server.start(port))
        self._transfers: dict[str, StagedTransfer] = {}
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._pending: dict[str, int] = {}
        self._pending_changed = threading.Condition()
        self._finished: set[str] = set()
        self._encoder = threading.Thread(target=self._encode_loop, name="lynx-encode", daemon=True)
        self._encoder.start()
        logger.info(
            "lynx: serving tiers on UCX port %d (codec %s, staging %d bytes, compatibility %s)",
            self.port,
            config.codec,
            config.staging_bytes,
            context.identity.compat,
        )

    @property
    def port(self) -> int:
        """Where this rank listens."""
        return self._server.port

    # ---- called by the connector within a step ------------------------------------------

    def apply_drops(self, metadata: LynxMetadata) -> None:
        """Before the step: stop reading blocks that are being taken away."""
        for request_id in metadata.dropped:
            if transfer := self._transfers.get(request_id):
                self._store.drop(transfer.transfer_id, "request ended before its prefill did")
        for request_id in metadata.preempted:
            if transfer := self._transfers.get(request_id):
                # Its prefill starts over; what was encoded would only be encoded again.
                transfer.restarts += 1
                self._wait_idle(request_id)
                transfer.encoded = 0

    def submit(self, metadata: LynxMetadata) -> None:
        """After the step's forward pass: queue its finished chunks."""
        if not metadata.encode:
            return
        ready = self._stream.record()
        for chunk in metadata.encode:
            transfer = self._transfers.get(chunk.request_id) or self._open(chunk)
            if transfer.dropped:
                continue
            tokens = TokenRange(chunk.start, chunk.end)
            first_block = chunk.start // self._block_size
            slots = slots_of(tokens, chunk.block_ids, first_block, self._block_size)
            with self._pending_changed:
                self._pending[chunk.request_id] = self._pending.get(chunk.request_id, 0) + 1
            self._jobs.put(_Job(transfer, tokens, slots, transfer.restarts, ready))

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
        pieces = plan_pieces(
            chunk.num_tokens,
            0,
            EXACT_FIRST_TOKENS,
            self._config.exact_last_tokens,
            self._codec,
            self._exact,
        )
        transfer = StagedTransfer(
            chunk.transfer_id, chunk.request_id, chunk.num_tokens, TierBuffers(pieces)
        )
        self._transfers[chunk.request_id] = transfer
        if not self._store.open(transfer):
            logger.warning(
                "lynx: request %s: no room in staging for %d bytes (%d of %d in use); its decode "
                "instance will be told",
                chunk.request_id,
                transfer.num_bytes,
                self._store.used_bytes,
                self._config.staging_bytes,
            )
        return transfer

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
            self._loop.post(self._server.notify)

    def _encode(self, job: _Job) -> None:
        transfer = job.transfer
        began = time.monotonic()
        with self._stream.after(job.ready):
            for piece, tokens in transfer.buffers.overlapping(job.tokens):
                if transfer.dropped or transfer.restarts != job.restarts:
                    return
                out: dict[Tier, np.ndarray] = {
                    tier: piece.view(tier, tokens) for tier in piece.codec.tiers
                }
                start = tokens.start - job.tokens.start
                slots = job.slots[start : start + len(tokens)]
                piece.codec.encode(self._cache, slots, out)
        transfer.touch()
        transfer.encoded = job.tokens.end
        self._events(
            "chunk_encoded",
            transfer.request_id,
            transfer.transfer_id,
            tokens_done=job.tokens.end,
            seconds=round(time.monotonic() - began, 4),
        )

    def _wait_idle(self, request_id: str) -> None:
        with self._pending_changed:
            self._pending_changed.wait_for(lambda: request_id not in self._pending)

    def stop(self) -> None:
        """End the encoder and the listener."""
        self._jobs.put(None)
        self._encoder.join(timeout=5.0)
        self._loop.run(self._server.stop(), timeout=5.0)
