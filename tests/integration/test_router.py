# SPDX-License-Identifier: Apache-2.0
"""Behind a stock vllm-router, which knows nothing of Lynx."""

import json

import httpx
import pytest

from .pair import TIMEOUT, post, prompt, tokens


def stream(url, path, body):
    text, ids, finish = "", [], None
    body = body | {"stream": True, "return_token_ids": True}
    with httpx.stream("POST", url + path, json=body, timeout=TIMEOUT, trust_env=False) as reply:
        assert reply.status_code == 200, reply.read()
        for line in reply.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            for choice in json.loads(line[6:]).get("choices", ()):
                delta = choice.get("delta", {}).get("content") or choice.get("text") or ""
                text += delta
                ids += choice.get("token_ids") or []
                finish = choice.get("finish_reason") or finish
    return text, ids, finish


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_both_endpoints_streaming_and_not(pair, chat, streaming):
    text = prompt(110)
    path = "/v1/chat/completions" if chat else "/v1/completions"
    body = {"model": "m", "temperature": 0, "max_tokens": 24}
    body |= {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
    url = pair.cluster.router.url

    blocking = post(url, path, body | {"vllm_xargs": {"lynx_start": "blocking"}})
    pair.forget()
    since = pair.mark()
    if streaming:
        answer, _, finish = stream(url, path, body)
    else:
        choice = post(url, path, body)["choices"][0]
        answer = choice["message"]["content"] if chat else choice["text"]
        finish = choice["finish_reason"]
    pair.forget()
    expected = blocking["choices"][0]
    assert answer == (expected["message"]["content"] if chat else expected["text"])
    assert finish == expected["finish_reason"]
    assert pair.events(since, "admitted")[0]["start"] == "speculative"
    assert pair.events(since, "verified")


def test_nothing_is_streamed_before_verification(pair):
    since = pair.mark()
    _, ids, _ = stream(
        pair.cluster.router.url,
        "/v1/completions",
        {"model": "m", "prompt": prompt(111), "temperature": 0, "max_tokens": 24},
    )
    events = [event["event"] for event in pair.events(since)]
    assert events.index("verified") < events.index("finished")
    assert len(ids) <= 24
    pair.forget()


def test_plain_requests_pass_the_decode_server_untouched(pair):
    text = prompt(112)
    since = pair.mark()
    answer = pair.completion(text)
    assert len(tokens(answer)) > 0
    assert not pair.events(since)
    pair.forget()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_n_answers_share_one_transfer(pair, chat, streaming):
    text = prompt(113)
    path = "/v1/chat/completions" if chat else "/v1/completions"
    body = {"model": "m", "temperature": 0, "max_tokens": 8}
    body |= {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
    url, since = pair.cluster.router.url, pair.mark()
    one = post(url, path, body | {"vllm_xargs": {"lynx_start": "blocking"}})["choices"][0]
    pair.forget()
    body |= {"n": 3, "temperature": 0.001}  # n > 1 must sample
    if streaming:
        _, ids, _ = stream(url, path, body)
        assert len(ids) == 24
    else:
        answers = post(url, path, body)["choices"]
        texts = {choice["message"]["content"] if chat else choice["text"] for choice in answers}
        assert texts == {one["message"]["content"] if chat else one["text"]}
        assert len(answers) == 3
    pair.forget()
    assert len(pair.events(since, "admitted")) == 2
    assert not pair.events(since, "failed")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_list_of_prompts_is_answered(pair, streaming):
    texts = [prompt(114), prompt(115, items=12), prompt(116)]
    url, since = pair.cluster.router.url, pair.mark()
    body = {"model": "m", "temperature": 0, "max_tokens": 8}
    expected = [tokens(pair.completion(text, max_tokens=8)) for text in texts]
    pair.forget()
    body |= {"prompt": texts, "return_token_ids": True}
    if streaming:
        _, ids, _ = stream(url, "/v1/completions", body)
        assert sorted(ids) == sorted(token for one in expected for token in one)
    else:
        answers = post(url, "/v1/completions", body)["choices"]
        assert [choice["token_ids"] for choice in answers] == expected
    pair.forget()
    assert len(pair.events(since, "admitted")) == 1
    assert not pair.events(since, "failed")


def test_a_prompt_that_differs_is_computed_by_the_decode_instance(pair, strict_decode):
    """As by a chat template that prints the time; whatever the policy."""
    text, other = prompt(117), prompt(118)
    expected = tokens(pair.completion(other))
    pair.forget()
    for decode in (pair, strict_decode):
        since = decode.mark()
        assert tokens(decode.completion(other, kv_transfer_params=pair.prefill(text))) == expected
        assert "prefill computed" in decode.wait_for(since, "failed")["cause"]
    pair.forget()


@pytest.mark.parametrize("appended", [1, 3])
def test_tokens_that_a_router_appended(pair, appended):
    """Some send the decode instance the prompt with what the prefill has sampled."""
    ids = pair.prompt_ids(prompt(119))
    answer = tokens(pair.completion(ids, max_tokens=16))
    pair.forget()
    since, params = pair.mark(), pair.prefill(ids)
    longer = pair.completion(
        ids + answer[:appended], kv_transfer_params=params, max_tokens=16 - appended
    )
    assert answer[:appended] + tokens(longer) == answer
    assert pair.events(since, "admitted")[0]["prompt_tokens"] == len(ids)
    pair.forget()
