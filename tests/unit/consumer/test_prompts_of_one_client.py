# SPDX-License-Identifier: Apache-2.0
"""Requests that share one handoff (n > 1, lists of prompts), and prompts that the prefill has not
computed, or only the beginning of."""

from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from lynx_connector.engine.metadata import LynxMetadata
from lynx_connector.wire.handoff import prompt_digest
from tests.unit.objects import admit, consumer, handoff, request

DIGEST = prompt_digest(range(100))


def offered(half, one, local=0):
    return half.match(one, local)


def released(half):
    metadata = LynxMetadata()
    half.fill(metadata, {})
    return [release.transfer_id for release in metadata.releases]


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("family", ["chatcmpl-7-0123abcd", "cmpl-7-0-0123abcd"])
def test_of_n_answers_the_first_loads_and_the_others_wait_for_its_prompt(recompute, family):
    half = consumer(recompute=recompute)
    first, second, third = (request(f"{i}_{family}", params=handoff()) for i in range(3))
    for one in (first, second, third):
        half.add(one)
    assert offered(half, second) == (None, False)
    assert admit(half, first)[0] == 100
    assert half.take_started() == []  # drafts would keep its prompt out of the prefix cache
    assert offered(half, second) == offered(half, third) == (None, False)
    half.received([first.request_id])
    assert offered(half, second, local=96) == (0, False)
    assert offered(half, third, local=96) == (0, False)
    for one in (second, third, first):
        half.finish(one)
    assert half.num_decodes == 0


def test_when_the_first_of_n_leaves_the_others_compute_their_prompt():
    half = consumer(recompute=False)
    first, second = (request(f"{i}_chatcmpl-7-0123abcd", params=handoff()) for i in range(2))
    half.add(first)
    half.add(second)
    assert offered(half, second) == (None, False)
    half.finish(first)
    assert offered(half, second) == (0, False)
    assert released(half) == ["t"]


def test_when_the_first_of_n_cannot_load_the_others_go_on():
    half = consumer(recompute=True)
    broken = handoff(ports=[1, 2])
    first, second = (request(f"{i}_chatcmpl-7-0123abcd", params=broken) for i in range(2))
    half.add(first)
    half.add(second)
    assert admit(half, first)[0] == 0
    assert offered(half, second) == (0, False)


def test_strangers_do_not_share_a_transfer():
    half = consumer(recompute=False)
    one, other = request("0_chatcmpl-7-0123abcd"), request("1_chatcmpl-8-0123abcd")
    for each in (one, other):
        each.kv_transfer_params = handoff()
        half.add(each)
    admit(half, one)
    (load,) = admit(half, other)[2].loads
    assert "already used" in load.failure


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_of_a_list_of_prompts_the_first_loads_and_the_others_are_computed(recompute, order):
    half = consumer(recompute=recompute)
    requests = [
        request(f"cmpl-7-{i}-0123abc{i}", prompt=100 - 10 * (i == 1), params=handoff(prompt=DIGEST))
        for i in range(3)
    ]
    requests[2].prompt_token_ids = [9] * 100
    for index in order:
        half.add(requests[index])
    assert offered(half, requests[1]) == offered(half, requests[2]) == (0, False)
    assert admit(half, requests[0])[0] == 100
    assert released(half) == []
    for one in requests:
        half.finish(one)
    assert half.num_decodes == 0 and not half.has_orphans


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize(
    ("lynx", "cause"),
    [
        ({"num_tokens": 101}, "same tokenizer"),
        ({"num_tokens": 99}, "cannot be compared"),
        ({"prompt": prompt_digest([1] * 100)}, "another prompt"),
        ({"num_tokens": 50, "prompt": prompt_digest([1] * 50)}, "another prompt"),
        ({"adapter": "french"}, "adapter 'french'"),
    ],
)
def test_another_prompt_is_computed_here_whatever_the_policy(recompute, lynx, cause, caplog):
    half, one = consumer(recompute=recompute), request(params=handoff(**lynx))
    half.add(one)
    count, _, metadata = admit(half, one)
    assert (count, metadata.loads, metadata.holds) == (0, [], [])
    assert [release.transfer_id for release in metadata.releases] == ["t"]
    assert cause in caplog.text and not half.has_orphans


def test_the_adapter_has_to_be_the_same():
    half, one = consumer(), request(params=handoff(adapter="french"))
    one.lora_request = SimpleNamespace(lora_name="french")
    half.add(one)
    assert admit(half, one)[0] == 100


def test_what_stands_behind_placeholders_has_to_be_the_same():
    cat = prompt_digest(range(100), ["cat"])
    for seen, count in (("cat", 100), ("dog", 0)):
        half, one = consumer(), request(params=handoff(prompt=cat))
        one.mm_features = [SimpleNamespace(identifier=seen)]
        half.add(one)
        assert admit(half, one)[0] == count


@pytest.mark.parametrize("extra", [1, 3, 40])
def test_tokens_that_a_router_appended_are_computed_here_on_the_final_cache(extra):
    half = consumer()
    one = request(prompt=100 + extra, params=handoff(prompt=DIGEST, first_token=7))
    half.add(one)
    count, asynchronous, metadata = admit(half, one)
    assert (count, asynchronous) == (100, True)
    (load,) = metadata.loads
    assert (load.num_tokens, load.first_token, load.speculative) == (100, 0, False)
    assert half.take_started() == half.take_first_tokens() == []


def test_a_prefix_that_is_here_already_needs_no_load():
    half = consumer()
    one = request(prompt=140, params=handoff(prompt=DIGEST))
    half.add(one)
    count, _, metadata = admit(half, one, local=128)
    assert (count, metadata.loads) == (0, [])
    assert [release.transfer_id for release in metadata.releases] == ["t"]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_in_mooncakes_shape_the_first_of_a_list_asks_whoever_comes_first(order, monkeypatch):
    half, asked = consumer(), []

    def resolve(leg):
        asked.append(leg.transfer_id)
        answer = Future()
        answer.set_result(handoff(prompt=DIGEST, cached_tokens=48))
        return answer

    monkeypatch.setattr(half._bootstrap, "resolve", resolve)
    leg = {
        "do_remote_prefill": True,
        "transfer_id": "x",
        "remote_engine_id": "e",
        "remote_bootstrap_addr": "http://h:1",
    }
    requests = [request(f"cmpl-7-{i}-0123abc{i}", params=leg) for i in range(2)]
    requests[1].prompt_token_ids = [9] * 100
    for index in order:
        half.add(requests[index])
    assert offered(half, requests[1]) == (0, False)
    assert admit(half, requests[0])[0] == 100
    assert asked == ["x"] and released(half) == []
    assert requests[0].prefill_stats.num_cached_tokens == 48  # what the prefill found


def test_in_nixls_shape_vllm_counts_cached_tokens_itself():
    half, one = consumer(), request(params=handoff(cached_tokens=48))
    half.add(one)
    admit(half, one)
    assert one.prefill_stats.num_cached_tokens == 100


BROKEN = [
    pytest.param({"final_tier": "best"}, id="field"),
    pytest.param({"codec": "klt"}, id="tables"),
    pytest.param({"num_tokens": None}, id="null"),
]


@pytest.mark.parametrize("lynx", BROKEN)
def test_a_handoff_that_cannot_be_read_is_given_back_at_once(lynx):
    half = consumer(recompute=False)
    one = request(params=handoff(**lynx))
    half.add(one)
    metadata = LynxMetadata()
    half.fill(metadata, {})
    (release,) = metadata.releases
    assert (release.transfer_id, release.host, release.ports) == ("t", "10.0.0.1", [7600])
    assert "malformed" in admit(half, one)[2].loads[0].failure
    assert released(half) == []


def test_a_handoff_that_cannot_be_read_takes_nothing_from_the_transfers_user():
    half, user = consumer(recompute=False), request("user", params=handoff())
    half.add(user)
    half.add(request("other", params=handoff(final_tier="best")))
    assert released(half) == []
    assert admit(half, user)[0] == 100


def test_a_handoff_without_a_place_is_not_given_back():
    half = consumer(recompute=False)
    half.add(request(params=handoff() | {"remote_host": None}))
    assert released(half) == []
