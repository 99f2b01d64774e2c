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
