# SPDX-License-Identifier: Apache-2.0
"""Handing over the prefill's token: by whom, to whom, and when not. On plain objects."""

import pytest

from lynx_connector.config import LynxConfig
from lynx_connector.engine.metadata import LynxWorkerMetadata
from lynx_connector.plan.planner import Planner
from lynx_connector.producer.scheduler import ProducerScheduler
from lynx_connector.scheduler import first_token
from tests.unit.objects import (
    BLOCK,
    NO_EVENTS,
    PREFILL,
    SHAPE,
    TOKEN,
    Sampling,
    admit,
    consumer,
    filled,
    handoff,
    request,
    step,
)

NUCLEUS = {"temperature": 0.8, "top_p": 0.9}

NOT_HANDED_OVER = [
    {"num_logprobs": 0},
    {"prompt_logprobs": 1},
    {"prompt_logprob_token_ids": [[1]]},
    {"n": 2},
    {"structured_outputs": object()},
    {"thinking_token_budget": 5},
    {"trace_decode_token_ids": [1]},
]


def reply(one, *, v2=False, custom_logits=False, **config):
    """What the producer replies to a whole prefill; the worker sees `one`'s parameters then."""
    half = ProducerScheduler(
        LynxConfig(**config),
        "engine",
        "10.0.0.1",
        1,
        BLOCK,
        NO_EVENTS,
        Planner(False, SHAPE, "gpu"),
        v2_runner=v2,
        custom_logits=custom_logits,
    )
    half.set_workers([7600], [""])
    half.add(one)
    filled(half, step(new=[(one.request_id, range(7), 0, 100)]))
    return half.finish(one)[1]["lynx"]


def taken(one, half=None, *, prefilled=None, **lynx):
    """What the consumer offers to emit for a request whose handoff says `lynx`."""
    half = half or consumer()
    one.kv_transfer_params = handoff(**lynx)
    half.add(one)
    admit(half, one)
    if prefilled is not None:
        half.update(LynxWorkerMetadata(first_tokens={one.request_id: prefilled}))
    return half.take_first_tokens()


def digest(**sampling):
    return first_token.sampling_digest(Sampling(**sampling))


# ---- producer ---------------------------------------------------------------------------------


def test_reply_carries_the_token_and_what_it_was_sampled_under():
    one = request(params=PREFILL, **NUCLEUS)
    lynx = reply(one)
    assert (lynx["first_token"], lynx["sampling"]) == (TOKEN, digest(**NUCLEUS))


def test_the_routers_min_tokens_is_undone_before_a_worker_sees_it():
    shared = Sampling(min_tokens=1)
    one = request(params=PREFILL)
    one.sampling_params = shared
    reply(one)
    assert one.sampling_params.min_tokens == 0
    assert shared.min_tokens == 1  # the children of one request share their parameters


@pytest.mark.parametrize("sampling", NOT_HANDED_OVER)
def test_nothing_is_handed_over_that_would_not_be_exact_or_complete(sampling):
    one = request(params=PREFILL, min_tokens=1, **sampling)
    lynx = reply(one, v2=True)
    assert (lynx["first_token"], lynx["sampling"]) == (None, "")
    assert one.sampling_params.min_tokens == 1


def test_children_of_a_request_with_n_above_one_hand_nothing_over():
    assert reply(request("0_cmpl-7", params=PREFILL))["first_token"] is None
    assert reply(request("cmpl-1_7", params=PREFILL))["first_token"] == TOKEN


def test_configuration_switches_it_off():
    assert reply(request(params=PREFILL), first_token=False)["first_token"] is None
    assert reply(request(params=PREFILL), custom_logits=True)["first_token"] is None


@pytest.mark.parametrize(
    ("v2", "temperature", "kept", "token"),
    [(False, 0.7, None, None), (True, 0.7, 7, TOKEN), (False, 0.0, None, TOKEN)],
)
def test_a_seed_is_kept_where_the_token_is_the_one_it_gives(v2, temperature, kept, token):
    one = request(params=PREFILL, seed=7, temperature=temperature)
    assert reply(one, v2=v2)["first_token"] == token
    assert one.sampling_params.seed == kept


# ---- consumer ---------------------------------------------------------------------------------


def test_the_reply_is_what_the_consumer_emits():
    lynx = reply(request(params=PREFILL, min_tokens=1, **NUCLEUS))
    assert taken(request(**NUCLEUS), **lynx) == [("r", TOKEN)]


def test_a_token_over_the_transport_is_emitted_once():
    half, one = consumer(), request()
    assert taken(one, half, prefilled=7, sampling=digest()) == [("r", 7)]
    assert half.take_first_tokens() == []
    half.finish(one)
    half.update(LynxWorkerMetadata(first_tokens={"r": 8}))
    assert half.take_first_tokens() == []


@pytest.mark.parametrize(
    "other",
    [
        {"temperature": 0.7},
        {"top_p": 0.5},
        {"top_k": 5},
        {"min_p": 0.1},
        {"repetition_penalty": 1.1},
        {"logit_bias": {1: 2.0}},
        {"allowed_token_ids": [1]},
        {"bad_words_token_ids": [[1]]},
        {"seed": 3},
    ],
)
def test_a_token_of_another_distribution_is_ignored(other):
    base = {"temperature": 1.0}
    half = consumer(seeds=True)
    assert taken(request(**base | other), half, first_token=TOKEN, sampling=digest(**base)) == []
    half, own = consumer(seeds=True), digest(**base | other)
    assert taken(request(**base | other), half, first_token=TOKEN, sampling=own) == [("r", TOKEN)]


def test_what_does_not_shape_a_greedy_token_is_no_difference():
    assert digest(top_p=0.5, seed=4) == digest()


@pytest.mark.parametrize(
    ("token", "sampling", "emitted"),
    [
        (TOKEN, {"min_tokens": 3}, True),
        (2, {"min_tokens": 3}, False),
        (2, {}, True),
        (TOKEN, {"min_tokens": 3, "temperature": 1.0}, False),
    ],
)
def test_min_tokens(token, sampling, emitted):
    got = taken(request(**sampling), first_token=token, sampling=digest(**sampling))
    assert got == ([("r", token)] if emitted else [])


@pytest.mark.parametrize("sampling", NOT_HANDED_OVER)
def test_the_consumer_refuses_what_a_producer_should_not_have_sent(sampling):
    one = request(**sampling)
    assert taken(one, consumer(seeds=True), first_token=TOKEN, sampling=digest(**sampling)) == []


@pytest.mark.parametrize("sampling", [{"presence_penalty": 1.0}, {"seed": 1, "temperature": 1.0}])
def test_what_only_the_v2_runner_keeps_exact(sampling):
    own = {"first_token": TOKEN, "sampling": digest(**sampling)}
    assert taken(request(**sampling), consumer(seeds=False), **own) == []
    assert taken(request(**sampling), consumer(seeds=True), **own) == [("r", TOKEN)]


def test_the_consumers_configuration_switches_it_off():
    half = consumer(first_token=False)
    assert taken(request(), half, first_token=TOKEN, sampling=digest()) == []


def test_a_transfer_that_is_not_used_emits_nothing():
    half = consumer()
    wrong = handoff(first_token=TOKEN, sampling=digest(), num_tokens=99)
    one = request(params=wrong)
    half.add(one)
    admit(half, one)
    assert half.take_first_tokens() == []
