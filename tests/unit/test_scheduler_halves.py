# SPDX-License-Identifier: Apache-2.0
"""The scheduler halves on plain objects, without vLLM and without torch."""

import enum
import subprocess
import sys
from types import SimpleNamespace

import pytest

from lynx_connector.config import LynxConfig, PlanMode
from lynx_connector.consumer.scheduler import ConsumerScheduler
from lynx_connector.events import EventLog
from lynx_connector.metadata import LynxMetadata, LynxWorkerMetadata
from lynx_connector.plan import KVShape
from lynx_connector.plan.planner import Planner
from lynx_connector.producer.scheduler import ProducerScheduler
from lynx_connector.protocol import parse_handoff, prompt_digest

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
    )


def test_halves_and_states_run_without_torch():
    code = (
        "import sys, lynx_connector.producer.scheduler, lynx_connector.consumer.scheduler, "
        "lynx_connector.scheduler.states; "
        "assert not {'torch', 'vllm'} & set(sys.modules), 'torch or vllm was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- producer ---------------------------------------------------------------------------------


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


def test_chunks_follow_the_prefill_and_cover_a_cached_prefix():
    half = producer()
    half.add(request(params=PREFILL))
    (first,) = filled(half, step(new=[("r", range(10, 14), 32, 24)])).encode
    assert (first.start, first.end, first.block_ids) == (0, 56, [10, 11, 12, 13])
    (second,) = filled(half, step(cached=[("r", range(14, 17), 56, 44)])).encode
    assert (second.start, second.end) == (56, 100)
    assert second.block_ids == [13, 14, 15, 16]
    assert not filled(half, step(cached=[("r", None, 100, 1)])).encode  # a decode step


HASHES = [bytes([number]) for number in range(6)]


def submitted(half, *outputs):
    """Hashes of every chunk, checked to lie beside their block."""
    found = []
    for output in outputs:
        for chunk in filled(half, output).encode:
            first = chunk.start // BLOCK
            assert len(chunk.hashes) == min(len(chunk.block_ids), 6 - first)
            found.append(chunk.hashes)
    return found


def test_hashes_lie_beside_the_blocks():
    half = producer()
    half.add(request(params=PREFILL, hashes=HASHES))
    chunks = submitted(
        half,
        step(new=[("r", range(10, 14), 32, 24)]),
        step(cached=[("r", range(14, 16), 56, 40)]),
        step(cached=[("r", [16], 96, 4)]),
    )
    assert chunks == [HASHES[:4], HASHES[3:], []]


@pytest.mark.parametrize(("left", "seam"), [(56, 3), (48, None)])
def test_a_block_encoded_half_before_and_half_after_a_preemption_is_not_kept(left, seam):
    half = producer()
    half.add(request(params=PREFILL, hashes=HASHES))
    chunks = submitted(
        half,
        step(new=[("r", range(10, 14), 0, left)]),
        step(preempted=["r"]),
        step(cached=[("r", range(20, 24), 16, 42)], resumed=["r"]),
        step(cached=[("r", [24], 58, 4)]),
        step(cached=[("r", [25, 26], 62, 38)]),
    )
    kept = [b"" if number == seam else one for number, one in enumerate(HASHES)]
    assert chunks == [HASHES[: -(-left // BLOCK)], kept[3:4], kept[3:4], kept[3:]]


@pytest.mark.parametrize("hashes", [[], HASHES[:3], [*HASHES, *HASHES]])
def test_hashes_of_other_block_sizes_are_not_used(hashes):
    half = producer()
    half.add(request(params=PREFILL, hashes=hashes))
    (chunk,) = filled(half, step(new=[("r", range(7), 0, 100)])).encode
    assert chunk.hashes == []


def test_hashes_are_not_sent_where_nothing_is_kept():
    for half in (producer(reuse_bytes=0), producer(prefix_caching=False)):
        half.add(request(params=PREFILL, hashes=HASHES))
        (chunk,) = filled(half, step(new=[("r", range(7), 0, 100)])).encode
        assert chunk.hashes == []


def test_reply_is_what_a_decode_instance_can_read():
    half = producer()
    wanted = request(params=PREFILL, seed=7)
    half.add(wanted)
    assert wanted.sampling_params.seed is None
    filled(half, step(new=[("r", range(7), 0, 100)]))
    delay, reply = half.finish(wanted)
    assert delay
    assert (reply["do_remote_prefill"], reply["do_remote_decode"]) == (True, False)
    handoff = parse_handoff(reply)
    assert handoff.address(0) == ("10.0.0.1", 7600)
    assert handoff.lynx.num_tokens == 100
    assert half.num_prefills == 0


OLD, NEW, OTHER = "0" * 32, "1" * 32, "2" * 32


def run(half, name, params=None):
    """A whole prefill of one chunk: (plan of its chunk, parsed handoff)."""
    one = request(name, params=params or PREFILL)
    half.add(one)
    (chunk,) = filled(half, step(new=[(name, range(7), 0, 100)])).encode
    return chunk.plan, parse_handoff(half.finish(one)[1]).lynx


def test_without_tables_the_fallback_codec_is_used_and_named():
    plan, lynx = run(producer(anchor_bits=3), "r")
    assert (plan.codec, plan.anchor_bits, plan.tables) == ("hadamard", 4, ())
    assert (lynx.codec, lynx.anchor_bits, lynx.tables) == ("hadamard", 4, [])


def test_warm_workers_use_their_tables_from_the_first_request():
    plan, lynx = run(producer(tables=[OLD], anchor_bits=5, final_tier="exact"), "r")
    assert (plan.codec, plan.anchor_bits, plan.tables) == ("klt", 5, (OLD,))
    assert (lynx.codec, lynx.anchor_bits, lynx.tables) == ("klt", 5, [OLD])
    assert plan.final_tier == lynx.final_tier == "exact"


def test_codecs_without_tables_ignore_learned_ones():
    plan, _ = run(producer(tables=[OLD], codec="int8"), "r")
    assert (plan.codec, plan.tables) == ("int8", ())


def test_switch_happens_between_requests_only():
    """Chunk 1 with old tables: so are chunk 2, the handoff and what follows a preemption."""
    half, one = producer(tables=[OLD]), request(params=PREFILL)
    half.add(one)
    (first,) = filled(half, step(new=[("r", range(4), 0, 50)])).encode
    half.update(LynxWorkerMetadata(tables={0: NEW}))
    (second,) = filled(half, step(cached=[("r", range(4, 6), 50, 30)])).encode
    assert first.plan == second.plan
    filled(half, step(preempted=["r"]))
    (again,) = filled(half, step(cached=[("r", range(20, 27), 0, 100)], resumed=["r"])).encode
    assert (again.start, again.end) == (80, 100)
    assert again.plan == first.plan
    assert parse_handoff(half.finish(one)[1]).lynx.tables == [OLD]
    assert run(half, "next")[1].tables == [NEW]


def test_all_ranks_need_tables_before_any_request_uses_them():
    half = producer(tp=2)
    half.update(LynxWorkerMetadata(tables={1: NEW}))
    assert run(half, "a")[0].codec == "hadamard"
    half.update(LynxWorkerMetadata(tables={0: OLD}))
    assert run(half, "b")[1].tables == [OLD, NEW]
    half.update(LynxWorkerMetadata(tables={0: OTHER}))
    assert run(half, "c")[1].tables == [OTHER, NEW]


def test_a_plain_copy_once_the_link_is_known_to_be_fast():
    half = producer(plan="auto", tables=[OLD], final_tier="exact")
    assert run(half, "first")[0].codec == "klt"  # nothing is measured yet
    half.update(LynxWorkerMetadata(link_mbit={0: 200_000.0}, step_ms={0: 30.0}))
    plan, lynx = run(half, "second")
    assert (plan.codec, plan.tables, plan.final_tier) == ("bf16", (), "exact")
    assert (lynx.codec, lynx.tables, lynx.draft_limit) == ("bf16", [], 0)
    half.update(LynxWorkerMetadata(link_mbit={0: 20.0}))
    plan, lynx = run(half, "third")
    assert (plan.codec, plan.tables, plan.final_tier) == ("klt", (OLD,), "exact")
    assert lynx.anchor_bits == plan.anchor_bits
    assert 1 <= lynx.draft_limit <= 64


def test_the_slowest_rank_decides():
    half = producer(tp=2, codec="hadamard", plan="auto")
    reports = LynxWorkerMetadata(link_mbit={0: 200_000.0})
    half.update(reports.aggregate(LynxWorkerMetadata(link_mbit={1: 1.0})))
    assert run(half, "r")[0].codec == "hadamard"


def test_fixed_plans_follow_the_configuration_on_any_link():
    half = producer(codec="hadamard", plan="fixed")
    half.update(LynxWorkerMetadata(link_mbit={0: 1e6}))
    assert run(half, "r")[0].codec == "hadamard"


def test_tokens_of_the_prefix_cache_are_marked_as_seen():
    half = producer()
    half.add(request(params=PREFILL))
    (first,) = filled(half, step(new=[("r", range(10, 14), 32, 24)])).encode
    assert (first.start, first.fresh) == (0, 32)
    (second,) = filled(half, step(cached=[("r", range(14, 17), 56, 44)])).encode
    assert second.fresh == 56


def test_aborted_prefill_is_dropped_and_its_blocks_wait_for_the_encoder():
    half = producer()
    aborted = request(params=PREFILL)
    half.add(aborted)
    filled(half, step(new=[("r", range(4), 0, 50)]))
    aborted.status = Status.FINISHED_ABORTED
    assert half.finish(aborted) == (True, None)
    assert filled(half, step()).dropped == ["r"]


def test_prefill_aborted_before_its_first_step_holds_nothing():
    half = producer()
    aborted = request(params=PREFILL)
    half.add(aborted)
    aborted.status = Status.FINISHED_ABORTED
    assert half.finish(aborted) == (False, None)


def test_preempted_prefill_encodes_no_token_twice():
    """A consumer may hold the first encoding; a second one rounds otherwise."""
    half = producer()
    half.add(request(params=PREFILL))
    filled(half, step(new=[("r", range(4), 0, 50)]))
    assert filled(half, step(preempted=["r"])).preempted == {"r"}
    assert not filled(half, step(cached=[("r", range(20, 22), 0, 32)], resumed=["r"])).encode
    (chunk,) = filled(half, step(cached=[("r", range(22, 27), 32, 68)])).encode
    assert (chunk.start, chunk.end, chunk.block_ids) == (50, 100, [23, 24, 25, 26])


def test_ordinary_requests_are_left_alone():
    half = producer()
    plain = request(seed=5)
    half.add(plain)
    assert plain.sampling_params.seed == 5
    assert not filled(half, step(new=[("r", range(7), 0, 100)])).encode
    assert half.finish(plain) == (False, None)


# ---- consumer ---------------------------------------------------------------------------------


def handoff(**lynx):
    ours = {
        "version": 3,
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


def test_load_carries_what_the_handoff_says_of_codec_and_tables():
    half = consumer(tp=2)
    lynx = {"codec": "klt", "tables": [OLD, NEW], "ports": [1, 2], "anchor_bits": 3}
    one = request(params=handoff(**lynx, final_tier="exact"))
    half.add(one)
    (load,) = admit(half, one)[2].loads
    assert (load.codec, load.anchor_bits, load.final_tier) == ("klt", 3, "exact")
    assert load.tables == [OLD, NEW]


def test_draft_limit_is_the_lower_of_ours_and_the_producers():
    half = consumer()
    for name, hint in (("none", 0), ("low", 5), ("high", 900)):
        one = request(name, params=handoff(draft_limit=hint) | {"remote_request_id": name})
        half.add(one)
    limits = [half.draft_limit_of(name) for name in ("none", "low", "high", "stranger")]
    assert limits == [64, 5, 64, 64]


def test_load_starts_behind_the_local_prefix():
    half, one = consumer(), request(params=handoff())
    half.add(one)
    count, asynchronous, metadata = admit(half, one, local=32)
    assert (count, asynchronous) == (68, True)
    (load,) = metadata.loads
    assert (load.first_token, load.num_tokens, load.block_ids) == (32, 100, [52, 53, 54, 55, 56])
    assert half.take_started() == ["r"]
    assert half.match(one, 0) == (0, False)  # one transfer per request


@pytest.mark.parametrize(
    ("half", "params", "sampling"),
    [
        (consumer(speculative=False), handoff(), {}),
        (consumer(), handoff(codec="int8"), {}),
        (consumer(), handoff(), {"extra_args": {"lynx_start": "blocking"}}),
        (consumer(seeds=False), handoff(), {"seed": 1, "temperature": 0.7}),
    ],
)
def test_requests_that_wait_for_the_final_tier(half, params, sampling):
    one = request(params=params, **sampling)
    half.add(one)
    *_, metadata = admit(half, one)
    assert not metadata.loads[0].speculative
    assert half.take_started() == []


def test_seeded_requests_draft_where_seeds_survive():
    half, one = consumer(seeds=True), request(params=handoff(), seed=1, temperature=0.7)
    half.add(one)
    admit(half, one)
    assert half.take_started() == ["r"]


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize(
    ("params", "cause"),
    [
        (handoff(num_tokens=99), "same tokenizer"),
        (handoff(ports=[1, 2]), "tensor_parallel_size"),
        ({"do_remote_prefill": True}, "no key 'lynx'"),
        (handoff(codec="klt"), "needs 1 tables"),
        (handoff(final_tier="best"), "final_tier"),
    ],
)
def test_unusable_handoff_follows_the_policy(recompute, params, cause):
    half, one = consumer(recompute=recompute), request(params=params)
    half.add(one)
    count, asynchronous, metadata = admit(half, one)
    if recompute:
        assert (count, asynchronous, metadata.loads) == (0, False, [])
        # What the producer staged is given back where its address is known.
        assert len(metadata.releases) == (1 if half._decodes["r"].handoff else 0)
    else:
        assert (count, asynchronous) == (100, True)
        assert cause in metadata.loads[0].failure


def test_a_transfer_serves_one_request():
    half, first, second = consumer(), request("1", params=handoff()), request("2", params=handoff())
    half.add(first)
    half.add(second)
    assert admit(half, first)[0] == 100
    count, _, metadata = admit(half, second)
    assert count == 0
    assert metadata.releases == []  # or the first would lose it


def test_full_local_hit_releases_the_producer():
    half, one = consumer(), request(params=handoff())
    half.add(one)
    count, _, metadata = admit(half, one, local=99)
    assert count == 0
    assert [release.transfer_id for release in metadata.releases] == ["t"]


def test_request_that_ends_before_its_load_releases_the_producer():
    half, one = consumer(), request(params=handoff())
    half.add(one)
    half.finish(one)
    metadata = LynxMetadata()
    half.fill(metadata, {})
    assert [release.transfer_id for release in metadata.releases] == ["t"]
    assert half.num_decodes == 0


def test_refined_when_every_rank_says_so():
    half, one = consumer(tp=2), request(params=handoff(ports=[1, 2]))
    half.add(one)
    admit(half, one)
    half.update(LynxWorkerMetadata(refined={"r": 1}))
    assert half.take_refined() == []
    half.update(LynxWorkerMetadata(refined={"r": 1}))
    assert half.take_refined() == ["r"]


def test_abort_cancels_what_is_under_way_and_only_that():
    half, one = consumer(), request(params=handoff())
    half.add(one)
    admit(half, one)
    half.finish(one)
    metadata = LynxMetadata()
    half.fill(metadata, {})
    assert [name for name, _ in metadata.cancelled] == ["r"]

    done = request("done", params=handoff())
    half.add(done)
    admit(half, done)
    half.update(LynxWorkerMetadata(refined={"done": 1}))
    half.finish(done)
    metadata = LynxMetadata()
    half.fill(metadata, {})
    assert metadata.cancelled == []


def test_reports_of_ranks_add_up():
    one = LynxWorkerMetadata(refined={"a": 1}, failed={"b": "x"}, tables={0: "t"})
    both = one.aggregate(LynxWorkerMetadata(refined={"a": 1, "c": 1}, tables={1: "u"}))
    assert both.tables == {0: "t", 1: "u"}
    assert not LynxWorkerMetadata()
    assert both.refined == {"a": 2, "c": 1}
    assert both.failed == {"b": "x"}


# ---- early reply ------------------------------------------------------------------------------


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


def test_a_prefill_is_answered_once_after_its_first_step():
    half = producer()
    one = request(params=PREFILL)
    half.add(one)
    assert half.take_answerable(["r"]) == []  # not scheduled: no worker knows its transfer
    filled(half, step(new=[("r", range(4), 0, 50)]))
    assert half.take_answerable(["other", "r"]) == ["r"]
    reply = half.reply_early(one)
    assert half.take_answerable(["r"]) == []
    lynx = parse_handoff(reply).lynx
    assert (lynx.early, lynx.num_tokens, lynx.prompt) == (True, 100, prompt_digest(range(100)))


def test_the_end_of_an_answered_prefill_goes_to_its_consumer():
    half = producer()
    one = running(half)
    half.reply_early(one)
    delay, reply, metadata = ended(half, one)
    assert (delay, reply, metadata.dropped) == (True, None, [])
    (outcome,) = metadata.outcomes
    assert (outcome.request_id, outcome.cause) == ("r", "")
    assert filled(half, step()).outcomes == []


def test_the_failure_of_an_answered_prefill_goes_to_its_consumer():
    half = producer()
    one = running(half)
    half.reply_early(one)
    delay, reply, metadata = ended(half, one, Status.FINISHED_ABORTED)
    assert (delay, reply) == (True, None)
    (outcome,) = metadata.outcomes
    assert "FINISHED_ABORTED" in outcome.cause
    assert outcome.first_token is None


@pytest.mark.parametrize("fields", [{"max_tokens": 2}, {"resumable": True}])
def test_requests_with_more_to_say_are_answered_at_their_end(fields):
    half = producer()
    one = running(half, **fields)
    assert half.reply_early(one) is None
    _, reply, metadata = ended(half, one)
    assert not parse_handoff(reply).lynx.early
    assert not metadata.outcomes


def test_early_reply_can_be_switched_off():
    half = producer(early_reply=False)
    one = running(half)
    assert half.take_answerable(["r"]) == []
    assert not parse_handoff(ended(half, one)[1]).lynx.early


def test_only_answered_prefills_are_given_up_when_their_transfer_is_released():
    half = producer()
    answered, waiting = running(half, "a"), running(half, "b")
    half.reply_early(answered)
    half.update(LynxWorkerMetadata(unwanted={"a", "b", "gone"}))
    assert half.take_unwanted() == ["a"]
    assert half.take_unwanted() == []
    assert parse_handoff(ended(half, waiting)[1])


def test_blocks_of_requests_that_wait_for_a_prefill_are_bounded():
    """Of 100 tokens each, 250 may be held: the third waits, and the fourth behind it."""
    half = consumer(waiting=250)
    names = ["a", "b", "c", "d"]
    ones = [request(n, params=handoff(early=True) | {"remote_request_id": n}) for n in names]
    for one in ones:
        half.add(one)
    assert [admit(half, one)[0] for one in ones[:2]] == [100, 100]
    assert [half.match(one, 0) for one in ones[2:]] == [(None, False)] * 2
    half.received({"a"})
    assert half.match(ones[3], 0) == (None, False)  # not before its turn
    assert admit(half, ones[2])[0] == 100
    half.finish(ones[1])
    assert admit(half, ones[3])[0] == 100


def test_requests_whose_prefill_is_over_are_not_counted():
    half = consumer(waiting=100)
    for name in ("a", "b", "c"):
        one = request(name, params=handoff() | {"remote_request_id": name})
        half.add(one)
        assert admit(half, one)[0] == 100


def test_a_prompt_larger_than_the_bound_enters_alone():
    half = consumer(waiting=10)
    one = request(params=handoff(early=True))
    half.add(one)
    assert admit(half, one)[0] == 100


def test_another_prompt_of_the_same_length_is_refused():
    half = consumer()
    one = request(params=handoff(prompt=prompt_digest([1] * 100)))
    half.add(one)
    assert admit(half, one)[0] == 0
    assert half._decodes["r"].failure.startswith("prefill computed another prompt")
