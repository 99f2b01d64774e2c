# SPDX-License-Identifier: Apache-2.0
"""Clients against a server made of a function: answers, errors, cuts, silence, leaving."""

import asyncio
import json
import math
import time

import httpx
import pytest

from tests.soak import load
from tests.soak.client import Choice, RequestError, ask
from tests.soak.kinds import CHAT, COMPLETIONS, Case, Compare, Route
from tests.soak.load import Load
from tests.soak.reference import Turn, Verdict

ANSWER = {"index": 0, "text": "ab", "token_ids": [5, 6], "finish_reason": "length"}


def http(respond):
    return httpx.AsyncClient(transport=httpx.MockTransport(respond))


def events(*parts, done=True):
    lines = [f"data: {json.dumps(part)}\n\n" for part in parts]
    return "".join(lines) + ("data: [DONE]\n\n" if done else "")


def asked(respond, stream=False, path=COMPLETIONS):
    async def once():
        async with http(respond) as connection:
            return await ask(connection, "http://s", path, {"prompt": [1]}, stream)

    return asyncio.run(once())


def test_a_streamed_answer_is_put_together_by_choice():
    parts = [
        {"choices": [{"index": 1, "text": "x", "token_ids": [9]}]},
        {"choices": [{"index": 0, "text": "a", "token_ids": [5]}]},
        {"choices": [{"index": 0, "text": "b", "token_ids": [6], "finish_reason": "stop"}]},
        {"choices": [{"index": 1, "text": "", "finish_reason": "length"}]},
        {"choices": [], "usage": {}},
    ]
    answer = asked(lambda request: httpx.Response(200, text=events(*parts)), stream=True)
    assert answer.choices == [Choice("ab", [5, 6], "stop"), Choice("x", [9], "length")]


def test_a_chat_brings_its_logprobs():
    top = [{"logprob": -0.1}, {"logprob": -2.1}]
    part = {
        "index": 0,
        "message": {"content": "ab"},
        "finish_reason": "stop",
        "logprobs": {"content": [{"logprob": -0.1, "top_logprobs": top}]},
    }
    answer = asked(lambda request: httpx.Response(200, json={"choices": [part]}), path=CHAT)
    (choice,) = answer.choices
    assert (choice.text, choice.logprobs, choice.gaps) == ("ab", [-0.1], [2.0])


@pytest.mark.parametrize(
    ("response", "stream", "status"),
    [
        (httpx.Response(503, text="No available workers"), False, 503),
        (httpx.Response(500, text="gone"), True, 500),
        (httpx.Response(200, text="<html>"), False, 0),
        (httpx.Response(200, json={"choices": []}), False, 0),
        (httpx.Response(200, json={"choices": [ANSWER | {"finish_reason": "abort"}]}), False, 0),
        (httpx.Response(200, text=events({"error": {"message": "gone"}})), True, 0),
        (
            httpx.Response(200, text=events({"choices": [{"index": 0, "text": "a"}]}, done=False)),
            True,
            0,
        ),
    ],
)
def test_what_is_not_a_whole_answer_is_an_error(response, stream, status):
    with pytest.raises(RequestError) as error:
        asked(lambda request: response, stream)
    assert error.value.status == status


class Fleet:
    class Server:
        url = "http://s"

    router = Server()
    prefills = decodes = (Server(),)


def run(respond, monkeypatch, case, leave=0.0, trouble=lambda: 0.0, bound=60.0):
    """What became of the first four requests."""
    monkeypatch.setattr(load, "new_client", lambda connections: http(respond))
    monkeypatch.setattr(load, "BOUND_SECONDS", bound)
    monkeypatch.setattr(load, "BACK_OFF_SECONDS", 0.01)
    monkeypatch.setattr(load, "PAUSE_SECONDS", 0.01)
    turns = {case.name: [Turn(case.body, [Choice("ab", [5, 6], "length")])]}
    clients = Load(Fleet(), [case], turns, clients=2, seed=1, leave=leave, trouble=trouble)

    async def some():
        running = asyncio.ensure_future(clients.run(math.inf))
        while len(clients.outcomes) < 4 and not running.done():
            await asyncio.sleep(0.01)
        running.cancel()
        await asyncio.wait([running])
        assert running.cancelled(), running.exception()

    asyncio.run(some())
    return clients.outcomes[:4]


def a_case(compare=Compare.GREEDY, route=Route.ROUTER):
    return Case("greedy", "greedy-1-1", COMPLETIONS, {"max_tokens": 0}, compare, route)


def good(request):
    reply = {"choices": [ANSWER], "kv_transfer_params": {"remote_host": "h"}}
    return httpx.Response(200, json=reply)


@pytest.mark.parametrize("route", Route)
def test_good_answers_on_every_route(monkeypatch, route):
    outcomes = run(good, monkeypatch, a_case(route=route))
    verdict = Verdict.SHAPED if route is Route.ORPHAN else Verdict.EQUAL
    assert {outcome.verdict for outcome in outcomes} == {verdict}


def test_one_wrong_answer_of_a_handoff_used_twice_is_seen(monkeypatch):
    seen = []

    def respond(request):
        body = json.loads(request.content)
        if body["kv_transfer_params"]["remote_host"] is None:
            return good(request)
        seen.append(body)
        other = ANSWER | {"token_ids": [5, 7]} if len(seen) % 2 else ANSWER
        return httpx.Response(200, json={"choices": [other]})

    outcomes = run(respond, monkeypatch, a_case(route=Route.TWICE))
    assert Verdict.WRONG in {outcome.verdict for outcome in outcomes}


def test_errors_are_failures_but_a_400_where_it_has_to_be(monkeypatch):
    def refuse(request):
        return httpx.Response(400, text="too long")

    (outcome, *_) = run(refuse, monkeypatch, a_case())
    assert (outcome.verdict, outcome.status) == (Verdict.FAILED, 400)
    (outcome, *_) = run(refuse, monkeypatch, a_case(Compare.REFUSED))
    assert outcome.verdict is Verdict.REFUSED


async def silent(request):
    await asyncio.sleep(3600)


def test_silence_never_ends_but_not_while_a_server_is_away(monkeypatch):
    outcomes = run(silent, monkeypatch, a_case(), bound=0.1)
    assert {outcome.verdict for outcome in outcomes} == {Verdict.NEVER}
    back = time.time() + 1.0
    outcomes = run(silent, monkeypatch, a_case(), bound=0.1, trouble=lambda: min(time.time(), back))
    assert all(outcome.end >= back for outcome in outcomes)


def test_clients_that_leave_do_not_wait(monkeypatch):
    monkeypatch.setattr(load, "PATIENCE", 0.01)
    outcomes = run(silent, monkeypatch, a_case(), leave=1.0)
    assert {outcome.verdict for outcome in outcomes} == {Verdict.LEFT}
