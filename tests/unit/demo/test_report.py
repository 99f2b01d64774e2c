# SPDX-License-Identifier: Apache-2.0
"""Events files and the figures read from them."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from lynx_connector.demo.report import IncompleteRunError, build_report, comparison_table
from lynx_connector.demo.timeline import save_png, terminal_timeline, time_range
from lynx_connector.testbed.client import Answer
from lynx_connector.testbed.link import loopback
from lynx_connector.testbed.trace import EventTail, Trace


def event(t: float, name: str, transfer: str = "a", **fields):
    line = {"t": t, "role": "producer", "event": name, "request": "r", "transfer": transfer}
    return line | fields


def speculative_events(begin: float = 100.0):
    wire = {"anchor": 4125, "residual": 4000}
    return [
        event(begin, "prefill_started", prompt_tokens=10),
        event(begin + 8, "prefilled"),
        event(begin + 8.1, "admitted", prompt_tokens=10, local_tokens=0, start="speculative"),
        event(begin + 9, "anchor_landed", wire_bytes={"anchor": 4125, "residual": 0}),
        event(begin + 9.1, "drafting"),
        event(begin + 10, "refined", wire_bytes=wire),
        event(begin + 10, "verify_started", drafts=7),
        event(begin + 10.2, "verified", drafted=7, accepted=6, ms=200.0),
        event(begin + 12, "finished"),
    ]


def blocking_events(begin: float = 200.0):
    return [
        {**entry, "transfer": "b"}
        for entry in speculative_events(begin)
        if entry["event"] in ("prefill_started", "prefilled", "admitted", "refined", "finished")
    ]


def trace_pair():
    lynx = Trace("speculative start", speculative_events(), [110.2] * 7 + [110.5])
    blocking = Trace("blocking", blocking_events(), [210.1 + 0.1 * n for n in range(8)])
    return lynx, blocking


def report_of(lynx: Trace, blocking: Trace, blocking_ids=None):
    ids = list(range(8))
    answers = Answer("text", ids, lynx.token_times), Answer("text", blocking_ids or ids)
    runs = (lynx, answers[0]), (blocking, answers[1])
    return build_report(loopback(200), "folder/model", 800, *runs)


def test_a_line_that_is_still_being_written_waits(tmp_path: Path):
    file = tmp_path / "events.jsonl"
    tail = EventTail([file, tmp_path / "absent.jsonl"])
    assert tail.poll() == []
    first, second = (json.dumps(event(t, "prefilled")) for t in (1, 2))
    file.write_text(first + "\n" + second[:10])
    assert [e["t"] for e in tail.poll()] == [1]
    with file.open("a") as stream:
        stream.write(second[10:] + "\n")
    assert [e["t"] for e in tail.poll()] == [1, 2]
    assert [e["t"] for e in tail.poll()] == [1, 2]


def test_the_latest_trace_begins_after_the_given_time():
    events = speculative_events() + blocking_events()
    assert Trace.latest("x", events, 0).events[0]["transfer"] == "a"
    assert Trace.latest("x", events, 150).events[0]["transfer"] == "b"
    assert {e["transfer"] for e in Trace.latest("x", events, 150).events} == {"b"}
    assert Trace.latest("x", events, 300) is None


def test_latencies_count_from_the_prefills_reply():
    lynx, _ = trace_pair()
    assert lynx.token_after_reply_ms(1) == pytest.approx(2200)
    assert lynx.token_after_reply_ms(8) == pytest.approx(2500)
    assert lynx.token_after_reply_ms(9) is None


def test_spans_follow_the_phases_that_took_place():
    lynx, blocking = trace_pair()
    names = ["prefill", "anchor", "residual", "drafts", "verification"]
    assert [span.name for span in lynx.spans()] == names
    assert [span.name for span in blocking.spans()] == ["prefill", "both tiers"]
    assert blocking.spans()[1].start == pytest.approx(208.1)


def test_report_has_every_promised_figure():
    report = report_of(*trace_pair())
    assert report["bits_per_element"] == {
        "anchor": pytest.approx(4.125),
        "total": pytest.approx(8.125),
    }
    assert report["wire_bytes"] == {"anchor": 4125, "residual": 4000}
    assert (report["prompt_tokens"], report["output_tokens"]) == (10, 8)
    assert (report["drafted"], report["accepted"]) == (7, 6)
    assert report["link_mbit"] == 200
    assert report["lynx"]["ttft_ms"] == pytest.approx(2200)
    assert report["blocking"]["ttft_ms"] == pytest.approx(2100)
    assert report["lynx"]["tt32_ms"] is None
    assert report["same_tokens_as_blocking"] is True
    json.dumps(report)


def test_bits_per_element_leave_out_tokens_that_were_not_sent():
    lynx, blocking = trace_pair()
    lynx.find("admitted")["local_tokens"] = 5
    assert report_of(lynx, blocking)["bits_per_element"]["anchor"] == pytest.approx(8.25)


def test_one_differing_token_is_seen():
    lynx, blocking = trace_pair()
    report = report_of(lynx, blocking, [*range(7), 99])
    assert report["same_tokens_as_blocking"] is False


@pytest.mark.parametrize("missing", ["prefilled", "anchor_landed", "refined", "verified"])
def test_a_run_without_speculative_start_is_not_reported(missing: str):
    lynx, blocking = trace_pair()
    lynx.events = [e for e in lynx.events if e["event"] != missing]
    with pytest.raises(IncompleteRunError, match=missing):
        report_of(lynx, blocking)


def test_terminal_timeline_keeps_its_width_and_puts_the_reply_at_zero():
    traces = trace_pair()
    console = Console(width=90, record=True, file=io.StringIO())
    console.print(terminal_timeline(traces, 90))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 90
    prefill = next(line for line in lines if "prefill" in line)
    anchor = next(line for line in lines if "anchor" in line)
    assert prefill.rindex("█") <= anchor.index("█")
    assert lines[-1].index("0") == pytest.approx(prefill.rindex("█"), abs=1)


def test_time_range_ends_with_the_last_thing():
    first, last = time_range(trace_pair())
    assert last == pytest.approx(2.8)
    assert first < 0


def test_picture_is_a_png(tmp_path: Path):
    save_png(trace_pair(), tmp_path / "timeline.png", "title")
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")


def test_table_shows_absent_figures_as_a_dash():
    console = Console(width=90, record=True, file=io.StringIO())
    console.print(comparison_table(report_of(*trace_pair())))
    lines = console.export_text().splitlines()
    row = next(line for line in lines if "token 32" in line)
    assert row.count("-") == 2
