# SPDX-License-Identifier: Apache-2.0
"""What today's routers send, replayed: one test a router, from facts read in its own code.

Each router is a function that sends both legs as that router does, headers and rewritten fields and
all, and returns the client's answer: text and reason of its end. It is asked twice, blocking and
speculative: the answers must be the same, and the second must have started on the anchor. The
facts are of May to August 2026; docs/deploy has a page for each. vllm-router itself runs in
`test_router.py`, which also has what proxies do that append the prefill's token to the prompt.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from .pair import PREFILL_LEG, TIMEOUT, Pair, prompt

Body = dict[str, Any]
Answer = tuple[str, str]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def request(path: str, seed: int, **more: Any) -> Body:
    """What a client sends."""
    text = prompt(seed)
    messages = [{"role": "user", "content": text}]
    body = {"messages": messages} if path == CHAT else {"prompt": text}
    return {"model": "m", "temperature": 0, "max_tokens": 24, **body, **more}


def send(url: str, body: Body, headers: dict[str, str] | None = None) -> Body:
    """A leg whose reply is read as a whole; its status must be 200."""
    reply = httpx.post(url, json=body, headers=headers, timeout=TIMEOUT, trust_env=False)
    assert reply.status_code == 200, reply.text
    return reply.json()


def answered(url: str, body: Body, headers: dict[str, str] | None = None) -> Answer:
    """The decode leg's answer, streamed if the client wants it so."""
    if not body.get("stream"):
        choice = send(url, body, headers)["choices"][0]
        return _text(choice), choice["finish_reason"]
    text, finish = "", ""
    with httpx.stream(
        "POST", url, json=body, headers=headers, timeout=TIMEOUT, trust_env=False
    ) as reply:
        assert reply.status_code == 200, reply.read()
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    text += _text(choice)
                    finish = choice["finish_reason"] or finish
    return text, finish


def _text(choice: Body) -> str:
    message = choice.get("message") or choice.get("delta") or {}
    return message.get("content") or choice.get("text") or ""


def capped(body: Body, *dropped: str, **more: Any) -> Body:
    """A prefill leg: one token, not streamed, without what the router drops."""
    leg = {key: value for key, value in body.items() if key not in dropped}
    return leg | {"max_tokens": 1, "stream": False} | more


def conforms(pair: Pair, router: Callable[[Body], Answer], body: Body) -> None:
    """Both ways of starting give the client the same; the second one drafts."""
    expected = router(body | {"vllm_xargs": {"lynx_start": "blocking"}})
    pair.forget()
    since = pair.mark()
    answer = router(body)
    pair.forget()
    assert answer == expected and answer[0]
    admitted = pair.events(since, "admitted")
    assert [event["start"] for event in admitted] == ["speculative"]
    assert pair.events(since, "verified")
    assert not pair.events(since, "failed")


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_vllm_router(pair: Pair, path: str) -> None:
    """0.1.17, NIXL shape: `min_tokens` 1 too, `n` and `stop` stay, addresses in the request id."""

    def route(body: Body) -> Answer:
        places = (urlsplit(url).netloc for url in (pair.prefill_url, pair.url))
        name = "___prefill_addr_{}___decode_addr_{}_{}".format(*places, uuid.uuid4().hex)
        headers = {"X-Request-Id": name}
        leg = capped(body, min_tokens=1, kv_transfer_params=PREFILL_LEG)
        leg.pop("stream_options", None)
        reply = send(pair.prefill_url + path, leg, headers)
        params = {"kv_transfer_params": reply["kv_transfer_params"]}
        return answered(pair.url + path, body | params, headers)

    conforms(pair, route, request(path, 1201, n=1, stop=["~~~"]))


@pytest.mark.parametrize("streaming", [False, True])
def test_llm_d_sidecar_nixlv2(pair: Pair, streaming: bool) -> None:
    """Sidecar of August 2026: both token limits, no stream options or `min_tokens`; a request id of
    its own beside the client's; the picker's header goes on to both legs."""

    def route(body: Body) -> Answer:
        own = ("x-request-id", str(uuid.uuid4()))
        picked = ("x-prefiller-host-port", urlsplit(pair.prefill_url).netloc)
        headers: Any = [("x-request-id", "client-1"), own, picked]
        leg = capped(body, "stream_options", "min_tokens", max_completion_tokens=1)
        leg["kv_transfer_params"] = PREFILL_LEG
        reply = send(pair.prefill_url + CHAT, leg, headers)
        # What it copies into the client's answer; null where nothing was cached.
        details = reply["usage"].get("prompt_tokens_details")
        assert details is None or details["cached_tokens"] >= 0
        decode = body | {"kv_transfer_params": reply["kv_transfer_params"]}
        return answered(pair.url + CHAT, decode, headers)

    more = {"stream": True, "stream_options": {"include_usage": True}} if streaming else {}
    conforms(pair, route, request(CHAT, 1202, min_tokens=4, **more))


def test_llm_d_sidecar_mooncake(pair: Pair) -> None:
    """Sidecar of August 2026: asks the bootstrap server for engines, then sends both legs at once,
    the prefill's with its data parallel rank; the prefill's reply is not looked at."""

    def route(body: Body) -> Answer:
        address = f"http://127.0.0.1:{pair.bootstrap_port}"
        engines = httpx.get(address + "/query", timeout=5, trust_env=False).json()
        rank, engine = next((rank, entry["engine_id"]) for rank, entry in engines.items())
        transfer = {"transfer_id": f"xfer-{uuid.uuid4()}"}
        leg = capped(body, "stream_options", "min_tokens", max_completion_tokens=1)
        to_decode = {"do_remote_decode": True, "do_remote_prefill": False}
        leg["kv_transfer_params"] = to_decode | transfer
        to_prefill = {"do_remote_decode": False, "do_remote_prefill": True}
        to_prefill |= {"remote_bootstrap_addr": address, "remote_engine_id": engine}
        decode = body | {"kv_transfer_params": to_prefill | transfer}
        with ThreadPoolExecutor(1) as pool:
            headers = {"X-data-parallel-rank": rank}
            prefill = pool.submit(send, pair.prefill_url + CHAT, leg, headers)
            answer = answered(pair.url + CHAT, decode)
            prefill.result()
        return answer

    conforms(pair, route, request(CHAT, 1203))


def test_llm_d_sidecar_chunked_decode(pair: Pair) -> None:
    """`--decode-chunk-size 10`: the first of three decode requests has the handoff, the next go on
    with an assistant's message each and have none."""

    def route(body: Body) -> Answer:
        leg = capped(body, max_completion_tokens=1, kv_transfer_params=PREFILL_LEG)
        params = send(pair.prefill_url + CHAT, leg)["kv_transfer_params"]
        messages, whole, finish = list(body["messages"]), "", ""
        for number, budget in enumerate((10, 10, 4)):
            limits = {"max_tokens": budget, "max_completion_tokens": budget, "stream": False}
            chunk = body | limits | {"messages": messages}
            if number == 0:
                chunk["kv_transfer_params"] = params
            else:
                chunk |= {"continue_final_message": True, "add_generation_prompt": False}
            text, finish = answered(pair.url + CHAT, chunk)
            whole += text
            if finish != "length":
                break
            messages = [*messages, {"role": "assistant", "content": text}]
        return whole, finish

    conforms(pair, route, request(CHAT, 1204))


def test_llm_d_decode_alone_after_a_prefill_that_failed(pair: Pair) -> None:
    """The client's own body goes to the decode instance; so does a short prompt by the picker."""
    body = request(CHAT, 1205)
    since = pair.mark()
    headers = {"x-request-id": str(uuid.uuid4())}
    text, finish = answered(pair.url + CHAT, body, headers)
    assert text and finish == "length"
    assert not pair.events(since)
    prefill, _ = answered(pair.prefill_url + CHAT, body, headers)  # the picker may choose it, too
    assert prefill == text
    pair.forget()


def test_dynamo(pair: Pair) -> None:
    """Worker of August 2026: token ids, NIXL's shape; what the engine returns goes on unchanged.
    (Its halves speak to their engines without HTTP.)"""

    def route(body: Body) -> Answer:
        ids = pair.prompt_ids(body["prompt"])
        leg = capped(body, min_tokens=1, prompt=ids, kv_transfer_params=PREFILL_LEG)
        params = send(pair.prefill_url + COMPLETIONS, leg)["kv_transfer_params"]
        decode = body | {"prompt": ids, "kv_transfer_params": params}
        return answered(pair.url + COMPLETIONS, decode)

    conforms(pair, route, request(COMPLETIONS, 1206))


@pytest.mark.parametrize("once", [False, True], ids=["each", "tokenized-once"])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_ray_serve_llm(pair: Pair, path: str, once: bool) -> None:
    """Ray of August 2026, the default backend, which an unknown connector gets; where it tokenizes
    once, the decode leg has the prefill's ids as its prompt, or in `kv_transfer_params`."""

    def route(body: Body) -> Answer:
        assert "kv_transfer_params" not in body  # it asserts that
        leg = capped(body, stream_options=None, kv_transfer_params=PREFILL_LEG)
        leg |= {"max_completion_tokens": 1} if path == CHAT else {}
        leg |= {"return_token_ids": True} if once else {}
        reply = send(pair.prefill_url + path, leg)
        decode = body | {"kv_transfer_params": reply["kv_transfer_params"]}
        if once and path == CHAT:
            decode["kv_transfer_params"]["prompt_token_ids"] = reply["prompt_token_ids"]
        elif once:
            decode["prompt"] = reply["choices"][0]["prompt_token_ids"]
        return answered(pair.url + path, decode)

    conforms(pair, route, request(path, 1207))


@pytest.mark.parametrize("streaming", [False, True])
def test_production_stack(pair: Pair, streaming: bool) -> None:
    """Orchestrated routing of August 2026: `remote_host` becomes the host of the prefill's URL, the
    client's request id is both legs'."""

    def route(body: Body) -> Answer:
        headers = {"X-Request-Id": "client-7"}
        leg = capped(body, "min_tokens", "stream_options", kv_transfer_params=PREFILL_LEG)
        params = send(pair.prefill_url + CHAT, leg, headers)["kv_transfer_params"]
        params["remote_host"] = urlsplit(pair.prefill_url).hostname
        return answered(pair.url + CHAT, body | {"kv_transfer_params": params}, headers)

    conforms(pair, route, request(CHAT, 1208, min_tokens=2, stream=streaming))


def test_aibrix(pair: Pair) -> None:
    """Gateway plugin of August 2026, agent `shfs`: both token limits, no `min_tokens`,
    `remote_host` becomes the prefill pod's IP."""

    def route(body: Body) -> Answer:
        leg = capped(body, "min_tokens", "stream_options", max_completion_tokens=1)
        leg["kv_transfer_params"] = PREFILL_LEG
        params = send(pair.prefill_url + CHAT, leg)["kv_transfer_params"]
        params["remote_host"] = "127.0.0.1"  # the pod's IP
        return answered(pair.url + CHAT, body | {"kv_transfer_params": params})

    conforms(pair, route, request(CHAT, 1209, min_tokens=2))


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_vllm_toy_proxy(pair: Pair, path: str) -> None:
    """`toy_proxy_server.py` of mid 2026: `min_tokens` for the decode leg alone, a bearer token that
    nobody checks, the handoff only where the prefill's reply has one."""

    def route(body: Body) -> Answer:
        headers = {"X-Request-Id": str(uuid.uuid4()), "Authorization": "Bearer None"}
        leg = capped(body, "min_tokens", "stream_options", kv_transfer_params=PREFILL_LEG)
        if "max_completion_tokens" in body:
            leg["max_completion_tokens"] = 1
        params = send(pair.prefill_url + path, leg, headers).get("kv_transfer_params", {})
        decode = body | ({"kv_transfer_params": params} if params else {})
        return answered(pair.url + path, decode, headers)

    more = {"max_completion_tokens": 24} if path == CHAT else {}
    conforms(pair, route, request(path, 1210, min_tokens=3, **more))
