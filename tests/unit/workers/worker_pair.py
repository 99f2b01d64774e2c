# SPDX-License-Identifier: Apache-2.0
"""A producer worker and a consumer worker in one process, over real UCX, without vLLM.

The steps of vLLM's loop are taken by hand: metadata down, reports up.
"""

import dataclasses
import time

import numpy as np
import torch
from lynx_kernels.shared.paged import PagedKVCache, PageIndex
from lynx_kernels.shared.rotation import NO_ROTATION

from lynx_connector.codec import KVGeometry
from lynx_connector.codec.klt_learner import TableLearner
from lynx_connector.config import LynxConfig
from lynx_connector.consumer.worker import ConsumerWorker
from lynx_connector.engine.metadata import EncodeChunk, EncodePlan, LoadRequest, LynxMetadata
from lynx_connector.engine.worker_context import WorkerContext
from lynx_connector.producer.worker import ProducerWorker
from lynx_connector.telemetry.events import EventLog
from lynx_connector.transport.handshake import Identity

BLOCK = 16
COMPAT = "0123456789abcdef" * 2


def geometry(dtype="float32"):
    return KVGeometry(2, 2, 64, dtype)


def noise_cache(tokens, seed, dtype="float32"):
    """A cache whose values have directions, as real keys do; slots are positions."""
    shape = (-(-tokens // BLOCK), 2, BLOCK, 128)
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(128, 128, generator=generator) / 8
    layers = {
        f"l{i}": (torch.randn(shape, generator=generator) @ mix).to(getattr(torch, dtype))
        for i in range(2)
    }
    return PagedKVCache(layers, BLOCK, 2, 64, PageIndex.rows(BLOCK, 64, 128))


def values(cache, slots):
    """Bits of K and V at `slots`, for exact comparison."""
    return torch.stack([cache.gather(layer, slots) for layer in range(2)], 1).contiguous()


def learned(cache, tokens, dtype="float32"):
    """Tables of a learner that has seen `tokens` tokens of `cache`."""
    learner = TableLearner(geometry(dtype))
    learner.observe(cache, np.arange(tokens), 0)
    return learner.build()


def until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.005)


class Events(EventLog):
    """Events in a list."""

    def __init__(self):
        super().__init__(None, "test")
        self.seen = []

    def __call__(self, event, request, transfer=None, **fields):
        self.seen.append({"event": event, "request": request, "transfer": transfer} | fields)

    def named(self, name):
        return [event for event in self.seen if event["event"] == name]


def context(loop, cache, config, dtype, size=1, rank=0):
    return WorkerContext(
        config=config,
        identity=Identity(COMPAT, f"engine/{rank}"),
        tables_key=COMPAT,
        rank=rank,
        tensor_parallel_size=size,
        port_offset=rank,
        geometry=geometry(dtype),
        rotation=NO_ROTATION,
        cache=cache,
        block_size=BLOCK,
        loop=loop,
        events=Events(),
    )


class Producer:
    """One prefill worker over a cache in which slot = position."""

    def __init__(self, loop, folder, tokens=4096, dtype="float32", seed=1, **config):
        self.cache = noise_cache(tokens, seed, dtype)
        self.config = LynxConfig(
            tables_dir=folder, staging_bytes=1 << 28, **{"codec": "klt"} | config
        )
        self.context = context(loop, self.cache, self.config, dtype)
        self.worker = ProducerWorker(self.context)
        self.events = self.context.events

    def plan(self, codec="hadamard", tables=(), anchor_bits=4, final_tier="residual"):
        return EncodePlan(codec, anchor_bits, final_tier, tuple(tables))

    def prefill(self, name, num_tokens, plan, chunk=512, start_slot=0, hashes=(), fresh=0):
        """Queue all chunks of a request whose tokens lie from `start_slot` (a block's) on.

        hashes: of its full blocks; those before token `fresh` were in the prefix cache.
        """
        first = start_slot // BLOCK
        for start in range(0, num_tokens, chunk):
            end = min(start + chunk, num_tokens)
            ids = list(range(first + start // BLOCK, first + -(-end // BLOCK)))
            one = EncodeChunk(
                name,
                "t-" + name,
                num_tokens,
                start,
                end,
                ids,
                plan,
                fresh=min(max(start, fresh), end),
                hashes=list(hashes[start // BLOCK : -(-end // BLOCK)]),
            )
            self.worker.submit(LynxMetadata(encode=[one]))

    def finish(self, name):
        """Wait until vLLM may have the blocks back."""
        asked = {name}

        def done():
            found = self.worker.take_finished(set(asked))
            asked.clear()
            return name in found

        until(done)

    def load(self, name, num_tokens, plan, speculative=True, first_token=0):
        """The consumer's LoadRequest for it; blocks in order, from block 0."""
        return LoadRequest(
            request_id=name,
            transfer_id="t-" + name,
            host="127.0.0.1",
            ports=[self.worker.port],
            codec=plan.codec,
            exact_first=1,
            exact_last=16,
            num_tokens=num_tokens,
            first_token=first_token,
            block_ids=list(range(first_token // BLOCK, -(-num_tokens // BLOCK))),
            speculative=speculative,
            anchor_bits=plan.anchor_bits,
            final_tier=plan.final_tier,
            tables=list(plan.tables),
        )

    def close(self):
        self.worker.stop()


class Consumer:
    """One decode worker."""

    def __init__(self, loop, folder, tokens=4096, dtype="float32", **config):
        config = {"staging_bytes": 1 << 28, "transfer_timeout_seconds": 5} | config
        self.cache = noise_cache(tokens, 99, dtype)
        self.config = LynxConfig(tables_dir=folder, **config)
        self.context = context(loop, self.cache, self.config, dtype)
        self.worker = ConsumerWorker(self.context)
        self.events = self.context.events
        self.refined, self.failed, self.received = set(), {}, set()
        self.first_tokens = {}

    def step(self, **metadata):
        self.worker.apply_cancellations(LynxMetadata(**metadata))
        self.worker.step(LynxMetadata(**metadata))
        finished, failed = self.worker.take_finished()
        report = self.worker.take_report()
        self.received |= finished
        self.refined |= set(report.refined)
        self.first_tokens |= report.first_tokens
        self.failed |= report.failed | dict.fromkeys(failed, "before its anchor")

    def fetch(self, load):
        """Until the load is refined or has failed; returns the cause of a failure."""
        self.step(loads=[load])
        return self.settle(load.request_id)

    def settle(self, name):
        until(lambda: self.step() or name in self.refined or name in self.failed)
        causes = [e["cause"] for e in self.events.named("failed") if e["request"] == name]
        return causes[0] if causes else None

    @property
    def idle(self):
        client = self.worker._client
        return (
            not self.worker._active and self.worker._budget.used == 0 and client.num_transfers == 0
        )


def changed(load, **fields):
    return dataclasses.replace(load, **fields)
