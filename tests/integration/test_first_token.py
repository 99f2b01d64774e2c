# SPDX-License-Identifier: Apache-2.0
"""The token that the prefill has sampled is the first of the decode instance, before any KV."""

import json
import time

import httpx
import pytest

from lynx_connector.transport import sources

from .pair import TIMEOUT, prompt, tokens
from .rogue import RogueProducer, compatibility_of

EOS = 2


def without(params):
    """A handoff that keeps the token to itself."""
    return params | {"lynx": params["lynx"] | {"first_token": None}}


def both(pair, text, **body):
    """Answers with the token handed over and without, and the events of the first."""
    asked = {k: v for k, v in body.items() if k != "max_tokens"}
    reference = pair.completion(
        text, kv_transfer_params=without(pair.prefill(text, **asked)), **body
    )
    pair.forget()
    since = pair.mark()
    answer = pair.lynx(text, **body)
    pair.forget()
    return answer, reference, pair.events(since)


def counted(answer):
    """Without what a prefill found in its prefix cache: it is asked twice."""
    return {k: v for k, v in answer["usage"].items() if k != "prompt_tokens_details"}


def named(events, name):
    return [event for event in events if event["event"] == name]


@pytest.mark.parametrize("start", ["auto", "blocking"])
def test_greedy_answers_are_the_same_with_and_without(pair, start):
    for seed in range(300, 306):
        body = {"max_tokens": 40, "ignore_eos": True, "vllm_xargs": {"lynx_start": start}}
        answer, reference, events = both(pair, prompt(seed, items=20 + seed % 9), **body)
        assert tokens(answer) == tokens(reference)
        assert counted(answer) == counted(reference)
        assert answer["choices"][0]["text"] == reference["choices"][0]["text"]
        (first,) = named(events, "first_token")
        assert first["token"] == tokens(answer)[0]
        landed = named(events, "refined" if start == "blocking" else "anchor_landed")[0]
        assert first["t"] < landed["t"]


def test_client_sees_it_before_any_kv(pair):
    text = prompt(310, items=120)
    params = pair.prefill(text)
    since = pair.mark()
    body = {"model": "m", "prompt": text, "temperature": 0, "max_tokens": 20, "stream": True}
    body |= {"kv_transfer_params": params, "return_token_ids": True, "ignore_eos": True}
    times, got = [], []
    url = pair.url + "/v1/completions"
    with httpx.stream("POST", url, json=body, timeout=TIMEOUT, trust_env=False) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                choice = json.loads(line[6:])["choices"][0]
                times += [time.time()] * len(choice["token_ids"])
                got += choice["token_ids"]
    assert got[0] == params["lynx"]["first_token"]
    assert len(got) == 20
    assert times[0] < pair.wait_for(since, "anchor_landed")["t"] < times[1]
    pair.forget()


@pytest.mark.parametrize("max_tokens", [1, 2, 3])
def test_max_tokens(pair, max_tokens):
    answer, reference, events = both(pair, prompt(311), max_tokens=max_tokens, ignore_eos=True)
    assert tokens(answer) == tokens(reference)
    assert len(tokens(answer)) == max_tokens
    assert answer["choices"][0]["finish_reason"] == "length"
    assert max_tokens > 2 or not named(events, "drafting"), "drafts that can never be emitted"


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}])
def test_stop_token_as_first_token(pair, sampling):
    text = prompt(312, items=80)
    params = pair.prefill(text, **sampling)
    first = params["lynx"]["first_token"]
    since = pair.mark()
    body = sampling | {"max_tokens": 20, "stop_token_ids": [first]}
    answer = pair.completion(text, kv_transfer_params=params, **body)
    assert tokens(answer) == [first]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert not pair.events(since, "drafting")
    pair.assert_idle()
    pair.forget()


def test_end_of_sequence_as_first_token(pair):
    """Routers set min_tokens on the prefill leg, which forbids what this client allows only."""
    body = {"allowed_token_ids": [EOS], "max_tokens": 20}
    answer, reference, events = both(pair, prompt(313), **body)
    assert tokens(answer) == tokens(reference) == [EOS]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert named(events, "first_token")


@pytest.mark.parametrize(
    "body", [{"logprobs": 2}, {"temperature": 0.8, "seed": 4}, {"presence_penalty": 0.5}]
)
def test_requests_that_sample_their_own_first_token(pair, body):
    since = pair.mark()
    pair.lynx(prompt(314), max_tokens=8, **body)
    assert not pair.events(since, "first_token")
    pair.forget()


def test_seeded_answers_repeat(pair):
    """The producer must neither fail on the seed nor sample under another one."""
    text = prompt(315, items=70)  # two prefill chunks
    body = {"temperature": 0.9, "seed": 11, "max_tokens": 12, "ignore_eos": True}
    answer, reference, _ = both(pair, text, **body)
    assert tokens(answer) == tokens(reference)


def test_transfer_that_fails_after_the_first_token(pair, strict_decode, ucx_loop, monkeypatch):
    text = prompt(316)
    expected = tokens(pair.completion(text, ignore_eos=True))
    pair.forget()
    sampling = pair.prefill_and_drop(text)["lynx"]["sampling"]
    pair.forget()
    producer = RogueProducer(ucx_loop, compatibility_of(pair.cluster.prefill.log), link_mbit=4)
    monkeypatch.setattr(sources, "checksum", lambda payload: 1)
    try:

        def handoff():
            ids = pair.prompt_ids(text)
            return producer.handoff(len(ids), first_token=expected[0], sampling=sampling)

        since = pair.mark()
        answer = pair.completion(text, ignore_eos=True, kv_transfer_params=handoff())
        assert tokens(answer) == expected
        events = [event["event"] for event in pair.events(since)]
        assert events.index("first_token") < events.index("failed")
        with pytest.raises(httpx.HTTPStatusError):
            strict_decode.completion(text, ignore_eos=True, kv_transfer_params=handoff())
    finally:
        producer.close()
    pair.forget()
