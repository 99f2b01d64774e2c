# SPDX-License-Identifier: Apache-2.0
"""Requests that end or start over early: clients that leave, preemption, few request slots."""

import asyncio
import time

import httpx
import pytest

from .pair import PREFILL_LEG, TIMEOUT, connections, prompt, tokens


def leave_at(pair, text, event, **body):
    """Send a decode leg and drop the connection when `event` is seen."""
    params = pair.prefill(text)
    since = pair.mark()

    async def run():
        async with httpx.AsyncClient(timeout=TIMEOUT, trust_env=False) as client:
            request = {"model": "m", "prompt": text, "temperature": 0, "max_tokens": 40}
            request |= {"kv_transfer_params": params, "ignore_eos": True} | body
            task = asyncio.create_task(client.post(pair.url + "/v1/completions", json=request))
            await asyncio.to_thread(pair.wait_for, since, event)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(run())
    return since


@pytest.mark.parametrize("event", ["admitted", "frame", "drafting"])
def test_client_gone(pair, event):
    """While waiting, while the anchor lands, while drafting: both sides stop at once."""
    text = prompt(120, items=80)
    since = leave_at(pair, text, event)
    finished = pair.wait_for(since, "finished")
    assert finished["status"] == "FINISHED_ABORTED"
    pair.assert_idle()
    pair.forget()
    sent = [e for e in pair.prefill_events_of(finished["transfer"]) if e["event"] == "tier_sent"]
    assert len(sent) < 2, "the producer went on sending"


def test_client_of_the_prefill_gone(pair):
    text = prompt(121, items=300)

    async def run():
        async with httpx.AsyncClient(timeout=TIMEOUT, trust_env=False) as client:
            body = {
                "model": "m",
                "prompt": text,
                "max_tokens": 2,  # so that it is answered at its end
                "kv_transfer_params": PREFILL_LEG,
            }
            task = asyncio.create_task(client.post(pair.prefill_url + "/v1/completions", json=body))
            await asyncio.sleep(1.0)
            task.cancel()

    asyncio.run(run())
    pair.assert_idle()


def preempted_at(pair, text, event, reference, **body):
    """Force a preemption at `event`; returns the `preempted` events."""
    since = pair.mark()

    def disturb():
        pair.wait_for(since, event)
        pair.preempt_everything()

    answer, _ = pair.many([lambda: pair.lynx(text, **body), disturb])
    assert tokens(answer) == reference
    pair.forget()
    return pair.events(since, "preempted")


def test_forced_preemption_while_drafting(pair):
    text = prompt(122, items=120)
    body = {"max_tokens": 30, "ignore_eos": True}
    expected = tokens(pair.completion(text, **body))  # recomputed here: the exact cache's answer
    pair.forget()
    found = preempted_at(pair, text, "drafting", expected, **body)
    assert found[0]["state"] == "drafting"


def test_forced_preemption_while_verifying(pair):
    """Rows go out in groups of 8, so that a preemption can fall between two of them."""
    text = prompt(123, items=120)
    body = {"max_tokens": 60, "ignore_eos": True, "logprobs": 0}
    expected = tokens(pair.completion(text, **body))
    pair.forget()
    for _ in range(10):
        found = preempted_at(pair, text, "verify_started", expected, **body)
        if found and found[0]["state"] == "verifying":
            return
    pytest.fail("no preemption fell into a verification")


def test_more_drafts_than_free_request_slots(pair):
    """12 slots, 8 ordinary requests decoding, and rows of two requests to verify."""
    texts = [prompt(124 + i, items=120) for i in range(2)]
    body = {"max_tokens": 40, "ignore_eos": True, "logprobs": 0}
    reference = [tokens(pair.blocking(text, **body)) for text in texts]
    since = pair.mark()
    calls = [lambda t=t: pair.lynx(t, **body) for t in texts]
    calls += [
        lambda i=i: pair.completion(prompt(140 + i), max_tokens=120, ignore_eos=True)
        for i in range(8)
    ]
    answers = [tokens(answer) for answer in pair.many(calls)]
    assert answers[:2] == reference
    assert all(len(answer) == 120 for answer in answers[2:])
    rows = [e for e in pair.events(since, "verify_started") if e["how"] == "rows"]
    assert rows
    assert max(event["drafts"] for event in rows) >= 4  # at most 4 slots are free
    pair.forget()


def test_connections_do_not_pile_up(pair):
    pair.lynx(prompt(130))
    before = connections(pair.cluster.decode.pid)
    for seed in range(131, 135):
        pair.lynx(prompt(seed))
    deadline = time.monotonic() + 5  # the last answer's own connection may still be closing
    while connections(pair.cluster.decode.pid) > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert connections(pair.cluster.decode.pid) <= before
    pair.forget()
