# SPDX-License-Identifier: Apache-2.0
"""The producer's scheduler half on plain objects: chunks, hashes, plans and replies."""

import subprocess
import sys

import pytest

from lynx_connector.engine.metadata import LynxWorkerMetadata
from lynx_connector.wire.handoff import parse_handoff
from tests.unit.objects import (
    BLOCK,
    NEW,
    OLD,
    OTHER,
    PREFILL,
    Status,
    filled,
    producer,
    request,
    run,
    step,
)


def test_halves_and_states_run_without_torch():
    code = (
        "import sys, lynx_connector.producer.scheduler, lynx_connector.consumer.scheduler, "
        "lynx_connector.scheduler.states; "
        "assert not {'torch', 'vllm'} & set(sys.modules), 'torch or vllm was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


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


def test_the_reply_says_what_was_in_the_prefix_cache():
    half, one = producer(), request(params=PREFILL)
    half.add(one)
    filled(half, step(new=[("r", range(4), 32, 24)]))
    filled(half, step(cached=[("r", range(4, 7), 56, 44)]))
    assert parse_handoff(half.finish(one)[1]).lynx.cached_tokens == 32


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
