# SPDX-License-Identifier: Apache-2.0
"""A failure's cause on its way from an event in the engine to the front end's answers."""

import asyncio

import pytest

from lynx_connector.engine import answers
from lynx_connector.engine.answers import Answers
from lynx_connector.engine.stats import LynxPromMetrics, LynxStats
from lynx_connector.telemetry.events import EventLog
from lynx_connector.telemetry.metrics import CONSUMER, PRODUCER, Meter


@pytest.fixture
def heard(monkeypatch):
    """What the front end has heard; nobody waits for more."""
    fresh = Answers()
    monkeypatch.setattr("lynx_connector.engine.stats.ANSWERS", fresh)
    monkeypatch.setattr(answers, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(answers, "WAIT_SECONDS", 0.01)
    return fresh


def found(heard, request_id):
    return asyncio.run(heard.find(request_id))


def front_end(stats):
    """One engine step's statistics as vLLM passes them on."""
    metrics = object.__new__(LynxPromMetrics)
    metrics.observe({name: stats.data[name] for name in stats.data if name == "explained"})


@pytest.mark.parametrize(
    ("engine", "answer"),
    [
        ("cmpl-7-0-0123abcd", "cmpl-7"),
        ("1_cmpl-7-2-0123abcd", "cmpl-7"),
        ("chatcmpl-7-0123abcd", "chatcmpl-7"),
        ("cmpl-a-1-0-0123abcd", "cmpl-a-1"),
        ("chatcmpl-0123abcd-0123abcd", "chatcmpl-0123abcd"),
    ],
)
def test_a_cause_is_found_by_the_id_that_the_client_sees(heard, engine, answer):
    meter = Meter()
    EventLog(None, CONSUMER, meter)("failed", engine, "t", cause="h:1: silent for 5 s", peer="h")
    front_end(LynxStats.take(meter))
    text = found(heard, answer)
    assert text.startswith("KV transfer from h failed: h:1: silent for 5 s (")
    assert found(heard, answer + "0") is None


def test_a_refused_prefill_is_explained(heard):
    meter = Meter()
    EventLog(None, PRODUCER, meter)("refused", "cmpl-7-0-0123abcd", None, cause="was used before")
    front_end(LynxStats.take(meter))
    assert "was used before" in found(heard, "cmpl-7")


def test_explanations_of_ranks_and_steps_come_together(heard):
    meters = [Meter(), Meter()]
    for rank, meter in enumerate(meters):
        EventLog(None, CONSUMER, meter)("failed", f"cmpl-{rank}-0-0123abcd", cause="x", peer="")
    both = LynxStats.take(meters[0]).aggregate(LynxStats.take(meters[1]))
    assert both.reduce() == {"lynx failures": 2}
    front_end(both)
    assert found(heard, "cmpl-0") == found(heard, "cmpl-1") == "KV transfer failed: x"


def test_what_is_kept_is_bounded(heard, monkeypatch):
    monkeypatch.setattr(answers, "MAX_KEPT", 2)
    for number in range(4):
        heard.explain(f"cmpl-{number}-0-0123abcd", "x")
    assert [found(heard, f"cmpl-{number}") for number in range(4)] == [None, None, "x", "x"]


def test_a_cause_that_comes_a_little_later_is_waited_for(heard, monkeypatch):
    monkeypatch.setattr(answers, "WAIT_SECONDS", 5)

    async def run():
        asyncio.get_running_loop().call_later(0.05, heard.explain, "cmpl-7-0-0123abcd", "late")
        return await heard.find("cmpl-7")

    assert asyncio.run(run()) == "late"
