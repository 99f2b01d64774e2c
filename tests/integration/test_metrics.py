# SPDX-License-Identifier: Apache-2.0
"""Metrics on `/metrics` of a running pair, and a trace of its events: they add up."""

import json
import time

import httpx
from prometheus_client.parser import text_string_to_metric_families

from lynx_connector.plan import KVShape, Setting
from lynx_connector.plan.modes import mode_of
from lynx_connector.telemetry.metrics import CATALOGUE, CONSUMER, PRODUCER, TIERS, Kind
from lynx_connector.telemetry.trace import read_events, to_chrome
from lynx_connector.wire.messages import PROTOCOL_VERSION

from .pair import post, prompt, tokens


def scrape(url):
    """Samples of Lynx by (name, values of its own labels in their names' order)."""
    text = httpx.get(url + "/metrics", timeout=30, trust_env=False).text
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("vllm:lynx_"):
                own = {"model_name", "engine"}
                labels = tuple(v for k, v in sorted(sample.labels.items()) if k not in own)
                found[sample.name.removeprefix("vllm:lynx_"), *labels] = sample.value
    return found


def planned_bytes(name, num_tokens):
    """Bytes by tier that a plan of klt or hadamard says a request of the test's model takes."""
    codec, bits = ("klt", int(name[3:])) if name.startswith("klt") else (name, 4)
    shape = KVShape(30, 3, 64, "float32")
    mode = mode_of(codec, shape, anchor_bits=bits)
    setting = Setting(shape, num_tokens, link_mbit=1, step_ms=1)
    anchor, total = (
        setting.wire_bytes(width, num_tokens) for width in (mode.tier_bits[0], mode.total_bits)
    )
    return {"anchor": anchor, "residual": total - anchor}


class Delta:
    """What both sides have counted since this was made.

    vLLM collects in engine steps, so that an idle instance is given one to have its last counts.
    """

    def __init__(self, pair):
        self._urls = {PRODUCER: pair.prefill_url, CONSUMER: pair.url}
        self._before = self._scrape()

    def _scrape(self):
        for url in self._urls.values():
            post(url, "/v1/completions", {"model": "m", "prompt": "Hi", "max_tokens": 1})
        time.sleep(0.5)
        return {role: scrape(url) for role, url in self._urls.items()}

    def take(self):
        self.now = self._scrape()
        return {
            role: {key: value - self._before[role].get(key, 0) for key, value in found.items()}
            for role, found in self.now.items()
        }


def test_every_metric_of_the_role_is_there(pair):
    for role, url in ((PRODUCER, pair.prefill_url), (CONSUMER, pair.url)):
        shown = {name for name, *_ in scrape(url)}
        for metric in CATALOGUE.values():
            suffix = {Kind.COUNTER: "_total", Kind.GAUGE: "", Kind.HISTOGRAM: "_count"}[metric.kind]
            there = metric.name + suffix in shown
            if metric.name != "plans":
                assert there == (role in metric.roles), metric.name


def test_sums_of_both_sides_agree(pair):
    text = prompt(700, items=120)
    delta = Delta(pair)
    since = pair.mark()
    answer = pair.lynx(text, max_tokens=24)
    pair.forget()
    pair.lynx(text, max_tokens=4, vllm_xargs={"lynx_start": "blocking"})
    pair.forget()
    pair.assert_idle()
    assert len(tokens(answer)) == 24
    taken = delta.take()
    sent, received = taken[PRODUCER], taken[CONSUMER]
    for tier in TIERS:
        assert sent["sent_bytes_total", tier] == received["received_bytes_total", tier], tier
    total = sum(sent["sent_bytes_total", tier] for tier in TIERS)
    events = pair.events(since, "refined")
    assert total == sum(event["bytes"] for event in events)
    assert sent["prefills_total", "complete"] == sent["prefill_seconds_count",] == 2
    assert sent["frame_queue_seconds_count", "residual"] > 0
    assert sent["frame_send_seconds_sum", "residual"] > 0
    admitted = pair.events(since, "admitted")[0]
    prompt_tokens = admitted["prompt_tokens"]
    producer = pair.prefill_events_of(admitted["transfer"])
    (plan,) = [event["plan"] for event in producer if event["event"] == "plan"]
    planned = planned_bytes(plan, prompt_tokens)
    assert {tier: sent["sent_bytes_total", tier] for tier in TIERS} == {
        tier: 2 * planned.get(tier, 0) for tier in TIERS
    }
    assert sent["encoded_tokens_total",] == 2 * prompt_tokens
    assert prompt_tokens / 2 < sent["reused_tokens_total",] < prompt_tokens
    assert received["requests_total", "speculative"] == received["requests_total", "blocking"] == 1
    assert received["refined_total",] == received["tier_seconds_count", "anchor"] == 2
    verified = pair.events(since, "verified")[0]
    assert received["drafted_tokens_total",] == verified["drafted"] > 0
    assert received["accepted_tokens_total",] == verified["accepted"] <= verified["drafted"]
    assert received["verifications_total", verified["how"]] == 1
    assert received["drafting_seconds_sum",] > 0
    for role, side in delta.now.items():
        assert side["staging_used_bytes", "0", role] == side["open_transfers", "0", role] == 0
        assert side["staging_limit_bytes", "0", role] > 0
        assert side["connections", "0", role] >= 1
        failures = {key: n for key, n in taken[role].items() if key[0] == "failures_total" and n}
        assert not failures


def test_a_failure_is_counted_under_its_cause(pair):
    delta = Delta(pair)
    text = prompt(701)
    params = pair.prefill(text)
    params["lynx"]["version"] = 1
    pair.completion(text, kv_transfer_params=params, max_tokens=2)
    pair.forget()
    taken = delta.take()[CONSUMER]
    assert taken["failures_total", "incompatible", CONSUMER] == 1
    assert taken["requests_total", "recompute"] == 1
    params["lynx"]["version"] = PROTOCOL_VERSION  # so that what is staged is fetched and released
    pair.completion(prompt(701), kv_transfer_params=params, max_tokens=1)
    pair.forget()


def test_the_events_make_a_trace(pair):
    since = pair.mark()
    pair.lynx(prompt(702, items=120), max_tokens=24)
    pair.forget()
    transfer = pair.events(since, "verified")[0]["transfer"]
    events = read_events([pair.prefill_events, pair.events_path])
    trace = to_chrome([event for event in events if event.get("transfer") == transfer])
    spans = {e["name"]: e for e in json.loads(json.dumps(trace))["traceEvents"] if e["ph"] == "X"}
    in_order = ["prefill", "anchor on the wire", "drafting", "verification", "decode"]
    starts = [spans[name]["ts"] for name in in_order]
    assert starts == sorted(starts)
    assert "residual on the wire" in spans
    assert all(span["dur"] >= 0 for span in spans.values())
