# SPDX-License-Identifier: Apache-2.0
"""Plain objects in place of vLLM's, and both scheduler halves on them, without torch."""

import enum
from types import SimpleNamespace

from lynx_connector.config import LynxConfig, PlanMode
from lynx_connector.consumer.scheduler import ConsumerScheduler
from lynx_connector.engine.metadata import LynxMetadata
from lynx_connector.plan import KVShape
from lynx_connector.plan.planner import Planner
from lynx_connector.producer.scheduler import ProducerScheduler
from lynx_connector.telemetry.events import EventLog
from lynx_connector.wire.handoff import parse_handoff
from lynx_connector.wire.messages import PROTOCOL_VERSION

BLOCK = 16


NO_EVENTS = EventLog(None, "test")


SHAPE = KVShape(30, 3, 64)


TOKEN = 42


class Status(enum.Enum):
    FINISHED_LENGTH_CAPPED = 1
    FINISHED_STOPPED = 2
    FINISHED_ABORTED = 3


class Sampling(SimpleNamespace):
    """The fields of vLLM's SamplingParams that the halves read."""

    def __init__(self, **given):
        super().__init__(
            **{
                "seed": None,
                "temperature": 0.0,
                "top_p": 1.0,
                "top_k": 0,
                "min_p": 0.0,
                "n": 1,
                "min_tokens": 0,
                "all_stop_token_ids": {2},
                "repetition_penalty": 1.0,
                "presence_penalty": 0.0,
                "frequency_penalty": 0.0,
                "logit_bias": None,
                "allowed_token_ids": None,
                "bad_words_token_ids": None,
                "watermarking": None,
                "num_logprobs": None,
                "prompt_logprobs": None,
                "prompt_logprob_token_ids": None,
                "structured_outputs": None,
                "thinking_token_budget": None,
                "trace_decode_token_ids": None,
                "extra_args": None,
            }
            | given
        )

    def clone(self):
        return Sampling(**vars(self))


def request(name="r", prompt=100, params=None, hashes=(), **sampling):
    return SimpleNamespace(
        request_id=name,
        num_prompt_tokens=prompt,
        kv_transfer_params=params,
        prompt_token_ids=list(range(prompt)),
        block_hashes=list(hashes),
        sampling_params=Sampling(**sampling),
        prompt_embeds=None,
        mm_features=[],
        resumable=False,
        max_tokens=1,
        output_token_ids=[TOKEN],
        status=Status.FINISHED_LENGTH_CAPPED,
        num_output_tokens=1,
        prefill_stats=SimpleNamespace(num_cached_tokens=prompt),
    )


def producer(tp=1, tables=None, prefix_caching=True, **config):
    half = ProducerScheduler(
        settings := LynxConfig(**{"codec": "klt"} | config),
        "engine",
        "10.0.0.1",
        tp,
        BLOCK,
        NO_EVENTS,
        Planner(settings.plan is PlanMode.AUTO, SHAPE, "gpu"),
        prefix_caching=prefix_caching,
    )
    half.set_workers([7600 + rank for rank in range(tp)], tables or [""] * tp)
    return half


def step(new=(), cached=(), preempted=(), resumed=()):
    """new: (id, blocks, computed, scheduled); cached: (id, new blocks or None, computed, n)."""
    return SimpleNamespace(
        preempted_req_ids=set(preempted),
        scheduled_new_reqs=[
            SimpleNamespace(req_id=r, block_ids=(list(b),), num_computed_tokens=c)
            for r, b, c, _ in new
        ],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[r for r, *_ in cached],
            new_block_ids=[None if b is None else (list(b),) for _, b, _, _ in cached],
            num_computed_tokens=[c for _, _, c, _ in cached],
            resumed_req_ids=set(resumed),
        ),
        num_scheduled_tokens={r: n for r, _, _, n in [*new, *cached]},
    )


def filled(half, output):
    metadata = LynxMetadata()
    half.fill(metadata, output)
    return metadata


PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}


OLD, NEW, OTHER = "0" * 32, "1" * 32, "2" * 32


def run(half, name, params=None):
    """A whole prefill of one chunk: (plan of its chunk, parsed handoff)."""
    one = request(name, params=params or PREFILL)
    half.add(one)
    (chunk,) = filled(half, step(new=[(name, range(7), 0, 100)])).encode
    return chunk.plan, parse_handoff(half.finish(one)[1]).lynx


def handoff(**lynx):
    ours = {
        "version": PROTOCOL_VERSION,
        "num_tokens": 100,
        "codec": "hadamard",
        "exact_first": 1,
        "exact_last": 16,
        "ports": [7600],
        "anchor_bits": 4,
        "final_tier": "residual",
        "tables": [],
    }
    return {
        "do_remote_prefill": True,
        "remote_engine_id": "e",
        "remote_request_id": "t",
        "remote_host": "10.0.0.1",
        "lynx": ours | lynx,
    }


def consumer(speculative=True, recompute=True, tp=1, seeds=False, waiting=1000, **config):
    return ConsumerScheduler(
        LynxConfig(**config), speculative, seeds, recompute, tp, BLOCK, NO_EVENTS, waiting
    )


def blocks(count):
    return SimpleNamespace(get_block_ids=lambda: (list(range(50, 50 + count)),))


def admit(half, one, local=0):
    count, asynchronous = half.match(one, local)
    half.allocated(one, blocks(7), count)
    metadata = LynxMetadata()
    half.fill(metadata, {})
    return count, asynchronous, metadata


def running(half, name="r", **fields):
    """A prefill of 100 tokens whose first 50 are computed."""
    one = request(name, params=PREFILL)
    vars(one).update(fields)
    half.add(one)
    filled(half, step(new=[(name, range(4), 0, 50)]))
    return one


def ended(half, one, status=Status.FINISHED_LENGTH_CAPPED):
    if status is Status.FINISHED_LENGTH_CAPPED:
        filled(half, step(cached=[(one.request_id, range(4, 7), 50, 50)]))
    one.status = status
    delay, reply = half.finish(one)
    return delay, reply, filled(half, step())
