# SPDX-License-Identifier: Apache-2.0
"""Prefills that are answered when they begin, behind stock routers and without one.

The early prefill server also chooses each request's plan itself.
"""

import json
import re
import time

import httpx
import pytest

from lynx_connector.testbed.cluster import router_process

from .conftest import LINK_MBIT
from .lone_servers import PrefillOnly
from .pair import post, prompt, tokens
from .test_ends import leave_at

PROMPTS = 20
OUTPUT_TOKENS = 64


@pytest.fixture(scope="module")
def early(model, pair, tmp_path_factory):
    """The session's pair with another prefill server, which answers when a prefill begins, with a
    plan for each request; it begins with the session pair's tables."""
    prefill = PrefillOnly(
        model,
        tmp_path_factory.mktemp("early"),
        link_mbit=LINK_MBIT,
        learn_tokens=2048,
        plan="auto",
        tables_dir=str(pair.prefill_events.parent / "tables-prefill"),
    )
    with prefill:
        yield prefill.before(pair)


@pytest.fixture
def routed(request, pair, early, tmp_path):
    """(pair, router's URL, whether replies are early)."""
    shape, is_early = request.param
    behind = early if is_early else pair
    port = behind.bootstrap_port if shape == "mooncake" else 0
    router = router_process(behind.prefill_url, behind.url, tmp_path / "router.log", port)
    router.start()
    try:
        router.wait_ready(60)
        yield behind, router.url, is_early
    finally:
        router.stop()


def reference(pair, text, **body):
    """The blocking answer; afterwards the prefill has to compute the prompt anew."""
    answer = pair.blocking(text, **body)
    forget_prefill(pair)
    return answer


def forget_prefill(pair):
    """Empty the prefill's prefix cache, as `Pair.forget` does on the decode side."""
    deadline = time.monotonic() + 20
    while not _reset(pair.prefill_url):
        assert time.monotonic() < deadline, "the prefill still holds blocks"
        time.sleep(0.1)


KNOWN = {}
"""Tokens of blocking answers by prefill server."""


def known_references(pair, texts, **body):
    """Tokens of the blocking answers, asked for once from each prefill server."""
    if pair.prefill_url not in KNOWN:
        blocking = {"vllm_xargs": {"lynx_start": "blocking"}, **body}
        calls = [lambda text=text: pair.lynx(text, **blocking) for text in texts]
        KNOWN[pair.prefill_url] = [tokens(answer) for answer in pair.many(calls, at_once=10)]
        pair.forget()
    return KNOWN[pair.prefill_url]


def _reset(url, **params):
    reply = httpx.post(url + "/reset_prefix_cache", params=params, timeout=30, trust_env=False)
    return reply.json().get("success", reply.status_code == 200)


def events_of(path, name):
    lines = path.read_text().splitlines()
    return [json.loads(line) for line in lines if f'"{name}"' in line]


@pytest.mark.parametrize(
    "routed",
    [(shape, early) for shape in ("nixl", "mooncake") for early in (True, False)],
    ids=lambda value: f"{value[0]}-{'early' if value[1] else 'late'}",
    indirect=True,
)
def test_twenty_prompts_of_64_tokens_behind_a_stock_router(routed):
    """The promise of `test_equality.py` in every mode of the router: one and two prefill chunks,
    six at once, one prompt twice at once."""
    pair, url, is_early = routed
    texts = [prompt(301 + i, items=3 + 4 * i) for i in range(PROMPTS)]
    limits = {"max_tokens": OUTPUT_TOKENS, "ignore_eos": True}
    expected = known_references(pair, texts, **limits)
    forget_prefill(pair)
    before = len(events_of(pair.prefill_events, "handoff"))
    since = pair.mark()
    body = {"model": "m", "temperature": 0, "return_token_ids": True} | limits

    def ask(text):
        return tokens(post(url, "/v1/completions", body | {"prompt": text}))

    asked = [*texts, texts[-1]]
    answers = pair.many([lambda text=text: ask(text) for text in asked], at_once=6)
    pair.forget()
    for text, ours, theirs in zip(asked, answers, [*expected, expected[-1]], strict=True):
        assert ours == theirs, text[:40]
    handoffs = events_of(pair.prefill_events, "handoff")[before:]
    assert len(handoffs) == len(answers)
    assert any(event["early"] for event in handoffs) is is_early
    verified = pair.events(since, "verified")
    assert any(event["accepted"] for event in verified)
    if not is_early:  # every transfer leaves time to draft
        assert len(verified) >= PROMPTS - 3  # a residual may land before the first draft
        assert any(event["rejected_token"] is not None for event in verified), "no wrong draft"
    assert len(pair.events(since, "first_token")) >= PROMPTS
    assert not pair.events(since, "failed")


def test_tiers_travel_while_the_prefill_runs(early):
    text = prompt(302, items=200)
    expected = tokens(reference(early, text))
    since = early.mark()
    answer = early.lynx(text)
    (admitted,) = early.events(since, "admitted")
    frame = early.events(since, "frame")[0]
    (prefilled,) = [
        event
        for event in early.prefill_events_of(admitted["transfer"])
        if event["event"] == "prefilled"
    ]
    assert frame["t"] < prefilled["t"]
    assert tokens(answer) == expected
    early.forget()


def test_the_plan_follows_what_was_measured(early):
    """The tests before have shown the link, and told how long a decode step takes."""
    early.lynx(prompt(305, items=90))
    early.forget()
    plan = events_of(early.prefill_events, "plan")[-1]
    measured = re.search(r"link (\d+) Mbit/s for 1, step \d+ ms$", plan["why"])
    assert measured, plan["why"]
    assert LINK_MBIT / 2 < int(measured[1]) < LINK_MBIT * 1.5
    assert plan["plan"].startswith("klt")  # a plain copy takes four times as long here


def test_client_gone_while_the_prefill_runs(early):
    """The router's prefill leg was answered long ago: the decode leg's end ends the prefill."""
    since = leave_at(early, prompt(303, items=400), "frame")
    transfer = early.wait_for(since, "finished")["transfer"]
    early.assert_idle()
    events = {event["event"]: event for event in early.prefill_events_of(transfer)}
    assert "FINISHED_ABORTED" in events["prefilled"]["cause"]
    encoded = events["chunk_encoded"]["tokens_done"]
    assert encoded < events["prefill_started"]["prompt_tokens"]
    early.forget()


def test_prefill_preempted_after_its_early_reply(early):
    text = prompt(304, items=200)
    expected = tokens(reference(early, text, ignore_eos=True))
    since = early.mark()

    def disturb():
        early.wait_for(since, "frame")
        assert _reset(early.prefill_url, reset_running_requests="true")

    answer, _ = early.many([lambda: early.lynx(text, ignore_eos=True), disturb])
    assert tokens(answer) == expected
    assert not early.events(since, "failed")
    early.forget()
