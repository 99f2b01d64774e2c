# SPDX-License-Identifier: Apache-2.0
"""The consumer's scheduler half on plain objects: admission, reports and ends."""

import pytest

from lynx_connector.engine.metadata import LynxMetadata, LynxWorkerMetadata
from tests.unit.objects import NEW, OLD, admit, consumer, handoff, request


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
        assert len(metadata.releases) == ("lynx" in params)
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


def test_the_lease_is_kept_from_when_the_request_is_known():
    half = consumer()
    waiting, unusable = request("r", params=handoff()), request("u", params=handoff(num_tokens=99))
    unusable.kv_transfer_params["remote_request_id"] = "other"
    half.add(waiting)
    half.add(unusable)
    metadata = LynxMetadata()
    half.fill(metadata, {})
    assert [(hold.transfer_id, hold.ports) for hold in metadata.holds] == [("t", [7600])]
    half.fill(again := LynxMetadata(), {})
    assert again.holds == []
