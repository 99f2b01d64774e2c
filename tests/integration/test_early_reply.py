# SPDX-License-Identifier: Apache-2.0
"""Prefills that are answered when they begin, behind stock routers and without one."""

import json
import time

import httpx
import pytest

from lynx_connector.demo.cluster import Cluster, Side, free_port, router_process
from lynx_connector.demo.link import loopback
from lynx_connector.launch import Role

from .conftest import LINK_MBIT, PREFILL_CHUNK
from .pair import post, prompt, tokens
from .test_ends import leave_at


class LatePrefill:
    """A prefill server that answers when a prefill has ended."""

    def __init__(self, model, folder):
        self.bootstrap_port = free_port()
        lynx = {
            "early_reply": False,
            "bootstrap_port": self.bootstrap_port,
            "tables_dir": str(folder / "tables"),
        }
        arguments = ["--max-num-batched-tokens", str(PREFILL_CHUNK), "--served-model-name", "m"]
        side = Side(lynx=lynx, vllm_args=arguments)
        link = loopback(LINK_MBIT)
        cluster = Cluster(model, folder, link=link, dtype="float32", router=False, prefill=side)
        self.server = cluster.prefill
        self.events_path = cluster.events_file(Role.PREFILL)


@pytest.fixture(scope="module")
def late(model, tmp_path_factory):
    prefill = LatePrefill(model, tmp_path_factory.mktemp("late"))
    prefill.server.start()
    try:
        prefill.server.wait_ready(300)
        yield prefill
    finally:
        prefill.server.stop()


@pytest.fixture
def routed(request, pair, tmp_path):
    """(router's URL, prefill's events file, whether its replies are early)."""
    shape, early = request.param
    late = None if early else request.getfixturevalue("late")
    url = late.server.url if late else pair.prefill_url
    events = late.events_path if late else pair.prefill_events
    port = (late or pair).bootstrap_port if shape == "mooncake" else 0
    router = router_process(url, pair.url, tmp_path / "router.log", port)
    router.start()
    try:
        router.wait_ready(60)
        yield router.url, events, early
    finally:
        router.stop()


def reference(pair, text, **body):
    """The blocking answer; afterwards the prefill has to compute the prompt anew."""
    answer = pair.blocking(text, **body)
    deadline = time.monotonic() + 20
    while not _reset(pair.prefill_url):
        assert time.monotonic() < deadline, "the prefill still holds blocks"
        time.sleep(0.1)
    return answer


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
def test_both_handoffs_of_a_stock_router(pair, routed):
    url, events, early = routed
    text = prompt(301, items=90)
    expected = reference(pair, text)
    body = {"model": "m", "prompt": text, "temperature": 0, "max_tokens": 32}
    since = pair.mark()
    answer = post(url, "/v1/completions", body | {"return_token_ids": True})
    pair.forget()
    assert tokens(answer) == tokens(expected)
    assert answer["usage"] == expected["usage"]
    assert events_of(events, "handoff")[-1]["early"] is early
    assert pair.events(since, "verified")
    assert not pair.events(since, "failed")


def test_tiers_travel_while_the_prefill_runs(pair):
    text = prompt(302, items=200)
    expected = tokens(reference(pair, text))
    since = pair.mark()
    answer = pair.lynx(text)
    (admitted,) = pair.events(since, "admitted")
    frame = pair.events(since, "frame")[0]
    (prefilled,) = [
        event
        for event in pair.prefill_events_of(admitted["transfer"])
        if event["event"] == "prefilled"
    ]
    assert frame["t"] < prefilled["t"]
    assert tokens(answer) == expected
    pair.forget()


def test_client_gone_while_the_prefill_runs(pair):
    """The router's prefill leg was answered long ago: the decode leg's end ends the prefill."""
    since = leave_at(pair, prompt(303, items=400), "frame")
    transfer = pair.wait_for(since, "finished")["transfer"]
    pair.assert_idle()
    events = {event["event"]: event for event in pair.prefill_events_of(transfer)}
    assert "FINISHED_ABORTED" in events["prefilled"]["cause"]
    encoded = events["chunk_encoded"]["tokens_done"]
    assert encoded < events["prefill_started"]["prompt_tokens"]
    pair.forget()


def test_prefill_preempted_after_its_early_reply(pair):
    text = prompt(304, items=200)
    expected = tokens(reference(pair, text, ignore_eos=True))
    since = pair.mark()

    def disturb():
        pair.wait_for(since, "frame")
        assert _reset(pair.prefill_url, reset_running_requests="true")

    answer, _ = pair.many([lambda: pair.lynx(text, ignore_eos=True), disturb])
    assert tokens(answer) == expected
    assert not pair.events(since, "failed")
    pair.forget()
