# SPDX-License-Identifier: Apache-2.0
"""What a client, a log and `/metrics` say of a request that failed, on running servers."""

import json
import re
import time
import uuid

import httpx
import pytest

from .pair import TIMEOUT, post, prompt
from .rogue import handoff

TEXT = prompt(170)


def ask(url, path, params, **body):
    """The reply to a request that is expected to fail, as it came."""
    chat = path.endswith("chat/completions")
    body |= {"messages": [{"role": "user", "content": TEXT}]} if chat else {"prompt": TEXT}
    body |= {"model": "m", "temperature": 0, "max_tokens": 8, "kv_transfer_params": params}
    return httpx.post(url + path, json=body, timeout=TIMEOUT, trust_env=False)


def failures(url, cause):
    """`lynx_failures_total` of a cause on the decode side."""
    text = httpx.get(url + "/metrics", timeout=30, trust_env=False).text
    lines = [line for line in text.splitlines() if line.startswith("vllm:lynx_failures_total{")]
    (line,) = [one for one in lines if f'cause="{cause}"' in one and 'role="consumer"' in one]
    return float(line.rsplit(" ", 1)[1])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_the_client_hears_the_cause_and_the_log_names_it_once(strict_decode, path, streaming):
    url = strict_decode.url
    before = failures(url, "connection_lost")
    since = strict_decode.mark()
    tokens = post(
        url,
        "/tokenize",
        {"model": "m", "messages": [{"role": "user", "content": TEXT}]}
        if "chat" in path
        else {"model": "m", "prompt": TEXT},
    )["count"]
    reply = ask(url, path, handoff("t", tokens, 9), stream=streaming)
    if streaming:
        assert reply.status_code == 200
        *_, last, done = reply.text.strip().split("\n\n")
        assert done == "data: [DONE]"
        error = json.loads(last.removeprefix("data: "))["error"]
    else:
        assert reply.status_code == 500
        error = reply.json()["error"]
    assert error["message"].startswith("KV transfer from 127.0.0.1 failed: cannot connect to ")
    assert "127.0.0.1:9" in error["message"] and "lynx doctor" in error["message"]
    assert failures(url, "connection_lost") == before + 1

    request = strict_decode.events(since, "failed")[0]["request"]
    log = strict_decode.server.log.read_text().splitlines()
    (line,) = [one for one in log if request in one and "KV transfer" in one]
    assert error["message"] in line


@pytest.mark.parametrize("streaming", [False, True])
def test_malformed_handoffs_are_the_clients_mistake(strict_decode, streaming):
    url, params = strict_decode.url, handoff("t", 100, 9) | {"remote_host": "a\nb"}
    before = failures(url, "malformed")
    since = strict_decode.mark()
    reply = ask(url, "/v1/completions", params, stream=streaming)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert "remote_host = 'a\\nb': expected a host name or address" in error["message"]
    assert failures(url, "malformed") == before + 1
    assert strict_decode.events(since) == []  # no engine has seen it


@pytest.mark.parametrize("streaming", [False, True])
def test_what_a_malformed_handoff_names_is_given_back_at_once(pair, strict_decode, streaming):
    params = pair.prefill(TEXT)
    transfer = params["remote_request_id"]
    params["lynx"]["final_tier"] = "best"
    reply = ask(strict_decode.url, "/v1/completions", params, stream=streaming)
    assert reply.status_code == 400
    assert "lynx.final_tier = 'best': expected one of" in reply.json()["error"]["message"]
    deadline = time.monotonic() + 10  # its lease is two minutes
    while not [e for e in pair.prefill_events_of(transfer) if e["event"] == "released"]:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def mooncake(pair, text):
    """A completion as Mooncake's routers ask for it: its usage."""
    bootstrap = f"http://127.0.0.1:{pair.bootstrap_port}"
    query = httpx.get(bootstrap + "/query", timeout=30, trust_env=False).json()
    name = uuid.uuid4().hex
    body = {"model": "m", "prompt": text, "temperature": 0}
    leg = {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": name}
    post(pair.prefill_url, "/v1/completions", body | {"max_tokens": 1, "kv_transfer_params": leg})
    leg = {
        "do_remote_decode": False,
        "do_remote_prefill": True,
        "transfer_id": name,
        "remote_engine_id": query["0"]["engine_id"],
        "remote_bootstrap_addr": bootstrap,
    }
    return pair.completion(text, max_tokens=4, kv_transfer_params=leg)["usage"]


def test_cached_tokens_are_the_prefills_in_either_handoff(pair):
    text = prompt(171, items=40)
    seen = []
    for other in ("", " and another end."):
        for usage in (
            lambda text: pair.lynx(text, max_tokens=4)["usage"],
            lambda text: mooncake(pair, text),
        ):
            pair.forget_prefill()
            if other:
                pair.prefill_and_drop(text)
            pair.forget()
            seen.append(usage(text + other)["prompt_tokens_details"]["cached_tokens"])
    cold, cold_mooncake, warm, warm_mooncake = seen
    assert cold == cold_mooncake == 0
    assert warm == warm_mooncake > 0
    pair.forget()


def test_a_transfer_id_used_twice_is_named_to_the_router(pair):
    body = {"model": "m", "prompt": TEXT, "temperature": 0, "max_tokens": 1}
    mooncake_leg = {"do_remote_decode": True, "transfer_id": uuid.uuid4().hex}
    first = post(pair.prefill_url, "/v1/completions", body | {"kv_transfer_params": mooncake_leg})
    pair.completion(TEXT, max_tokens=1, kv_transfer_params=first["kv_transfer_params"])
    pair.forget()
    reply = httpx.post(
        pair.prefill_url + "/v1/completions",
        json=body | {"kv_transfer_params": mooncake_leg},
        timeout=TIMEOUT,
        trust_env=False,
    )
    assert reply.status_code == 500
    assert re.search(r"transfer_id .* was used before", reply.json()["error"]["message"])
