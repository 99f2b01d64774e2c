# SPDX-License-Identifier: Apache-2.0
"""Events files to a trace: the spans of a request, and what bad files are told."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from lynx_connector.cli import app
from lynx_connector.telemetry.trace import ROWS, Timeline, TraceError, read_events, to_chrome
from lynx_connector.testbed.trace import EventTail


def event(t, name, role="producer", transfer="t1", engine="e1", **fields):
    line = {"t": t, "role": role, "engine": engine, "event": name, "transfer": transfer}
    return line | {"request": "r" if transfer else None} | fields


def prefill(begin=100.0):
    frame = {"bytes": 10, "tokens_done": 8, "queue_seconds": 0.0, "seconds": 0.5}
    return [
        event(begin, "prefill_started", prompt_tokens=8),
        event(begin + 3, "chunk_encoded", tokens_done=8, tokens=8, seconds=1.0),
        event(begin + 4, "handoff", prompt_tokens=8, codec="klt"),
        event(begin + 4, "prefill_ended", outcome="complete", seconds=4.0, status="x"),
        event(begin + 5, "frame_sent", tier="anchor", **frame),
        event(begin + 6, "frame_sent", tier="residual", **frame),
        event(begin + 7, "frame_sent", tier="residual", **frame),
        event(begin + 8, "released", cause="done", bytes=1, staging_bytes=0),
    ]


def decode(begin=104.0):
    def one(after, name, **fields):
        return event(begin + after, name, "consumer", engine="e2", **fields)

    return [
        one(0.2, "admitted", prompt_tokens=8, local_tokens=0, start="speculative"),
        one(1.0, "frame_received", tier="anchor", bytes=10, tokens_done=8, wanted=True),
        one(1.1, "anchor_landed", bytes=10),
        one(1.2, "drafting"),
        one(1.9, "paused", why="limit", drafts=3),
        one(3.1, "refined", bytes=30),
        one(3.2, "verify_started", drafts=3, how="rows", drafting_seconds=2.0),
        one(3.5, "verified", drafted=3, accepted=3, how="rows", steps=1, ms=300.0),
        one(5.0, "finished", output_tokens=9, status="x"),
    ]


def spans(trace):
    return {e["name"]: e for e in trace["traceEvents"] if e["ph"] == "X"}


def test_a_request_has_all_its_spans():
    trace = to_chrome([*prefill(), *decode()])
    found = spans(trace)
    expected = {
        "prefill": (0, 4),
        "encode": (2, 3),
        "anchor on the wire": (4.5, 5),
        "residual on the wire": (5.5, 7),
        "waiting for KV": (4.2, 5.1),
        "anchor arriving": (5.0, 5.0),
        "drafting": (5.2, 7.2),
        "verification": (7.2, 7.5),
        "decode": (7.5, 9.0),
    }
    assert set(found) == set(expected)
    for name, (start, end) in expected.items():
        assert found[name]["ts"] == pytest.approx(start * 1e6), name
        assert found[name]["dur"] == pytest.approx((end - start) * 1e6), name
    processes = {e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"}
    assert processes == {"producer e1", "consumer e2"}
    instants = {e["name"] for e in trace["traceEvents"] if e["ph"] == "i"}
    assert {"handoff", "released", "paused"} <= instants
    assert "frame_sent" not in instants
    assert found["prefill"]["pid"] != found["drafting"]["pid"]


def test_spans_of_one_row_do_not_overlap_and_requests_have_rows_of_their_own():
    second = [e | {"transfer": "t2", "t": e["t"] + 0.5} for e in [*prefill(), *decode()]]
    trace = to_chrome([*prefill(), *decode(), *second])
    by_row = {}
    for one in trace["traceEvents"]:
        if one["ph"] == "X":
            by_row.setdefault((one["pid"], one["tid"]), []).append((one["ts"], one["dur"]))
    for row in by_row.values():
        row.sort()
        for (start, duration), (following, _) in itertools.pairwise(row):
            assert start + duration <= following + 1
    names = [e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"]
    assert len(names) == len(set(names)) + 4  # both roles call the request's rows the same
    assert any("(t1)" in name for name in names) and any("(t2)" in name for name in names)


def test_a_failure_is_an_instant_with_its_cause():
    failed = event(105.0, "failed", "consumer", cause="silent for 5 s", peer="h")
    trace = to_chrome([*decode()[:2], failed])
    (instant,) = [e for e in trace["traceEvents"] if e["name"] == "failed"]
    assert (instant["ph"], instant["args"]["cause"]) == ("i", "silent for 5 s")
    assert "decode" not in spans(trace)


def test_a_blocking_request_decodes_from_its_refined_cache():
    names = ("admitted", "refined", "finished")
    found = spans(to_chrome([e for e in decode() if e["event"] in names]))
    assert found["decode"]["ts"] == pytest.approx(2.9e6)
    assert "drafting" not in found


def test_ranks_make_one_span_from_the_first_to_the_last():
    events = [*prefill(), event(100.5, "prefill_started", prompt_tokens=8)]
    events.append(event(104.5, "prefill_ended", outcome="complete", seconds=4.0, status="x"))
    (span,) = [s for s in Timeline(events).phases() if s.name == "prefill"]
    assert (span.start, span.end) == (100.0, 104.5)


times = st.lists(st.floats(1e9, 1e9 + 1e4), min_size=1, max_size=12)


@given(times, st.data())
def test_any_events_make_a_trace_that_can_be_read(stamps, data):
    kinds = sorted({e["event"] for e in [*prefill(), *decode()]})
    whole = {e["event"]: e for e in [*prefill(), *decode()]}
    chosen = data.draw(st.lists(st.sampled_from(kinds), min_size=len(stamps)))
    events = [whole[name] | {"t": t} for t, name in zip(sorted(stamps), chosen, strict=False)]
    trace = json.loads(json.dumps(to_chrome(events)))
    for one in trace["traceEvents"]:
        assert one["ph"] in "MXi"
        assert one.get("dur", 0) >= 0
    assert all(span.row in ROWS for span in Timeline(events).phases())


# ---- files -------------------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path):
    def make(name, *lines):
        path = tmp_path / name
        path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n"
                                for line in lines))  # fmt: skip
        return path

    return make


def test_files_are_read_in_order_of_time(write):
    files = [write("d", *decode()), write("p", *prefill())]
    assert [e["t"] for e in read_events(files)] == sorted(e["t"] for e in [*prefill(), *decode()])


def test_a_line_that_is_being_written_is_left_out(write):
    assert len(read_events([write("p", *prefill(), '{"t": 1.0, "ro')])) == len(prefill())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json\n", "not JSON"),
        ('{"t": \n', "not JSON"),
        ("[1]\n", "not a JSON object"),
        ('{"event": "x", "role": "producer"}\n', "not an event of Lynx: 't' is None"),
        ('{"t": 1, "event": 3, "role": "a"}\n', "not an event of Lynx: 'event' is 3"),
        ("[" * 100_000 + "\n", "not JSON"),
        ("\x00" * 4096 + "\n", "not JSON"),
    ],
)
def test_lines_that_are_no_events_are_passed_over_and_told(write, line, message):
    events = read_events([write("events", prefill()[0], line, prefill()[1])])
    assert [e["event"] for e in events] == [e["event"] for e in prefill()[:2]]
    assert events.unreadable == 1
    assert f"events:2: {message}" in events.why
    with pytest.raises(TraceError, match="no events") as caught:
        read_events([write("events", line)])
    assert f"events:1: {message}" in str(caught.value)


@pytest.mark.parametrize("lines", [[], ['{"t": 1']])
def test_a_file_without_events_is_named(write, lines):
    with pytest.raises(TraceError, match="events: no events"):
        read_events([write("events", *lines)])


def test_an_event_behind_half_a_line_is_found(write):
    """Another process went on where the first one met a full disk."""
    whole = json.dumps(prefill()[0], separators=(",", ":"))
    events = read_events([write("events", '{"t":1.5,"role":"prod' + whole + "\n")])
    assert events == [prefill()[0]]
    assert events.unreadable == 1


def test_a_tail_passes_over_what_it_cannot_read(write):
    path = write("events", prefill()[0], "half a li\n")
    tail = EventTail([path])
    tail.poll()
    with path.open("a") as file:
        file.write(json.dumps(prefill()[1]) + "\n[]\n")
    assert tail.poll() == prefill()[:2]
    assert tail.unreadable == 2


def test_an_event_without_its_fields_is_an_error():
    with pytest.raises(TraceError, match=r"transfer t1: .*'seconds'"):
        to_chrome([event(1.0, "chunk_encoded")])


def test_the_command_writes_a_trace(write, tmp_path):
    files = [str(write("p", *prefill())), str(write("d", *decode()))]
    out = tmp_path / "trace.json"
    result = CliRunner().invoke(app, ["trace", *files, "-o", str(out)])
    assert result.exit_code == 0, result.output
    assert "1 requests" in result.output
    assert json.loads(out.read_text())["traceEvents"]
    assert "passed over" not in result.output


def test_the_command_says_what_it_passed_over(write, tmp_path):
    file = write("p", *prefill()[:2], "half\n", "[]\n", *prefill()[2:])
    result = CliRunner().invoke(app, ["trace", str(file), "-o", str(tmp_path / "trace.json")])
    assert result.exit_code == 0, result.output
    assert "2 lines could not be read and were passed over" in result.output
    assert f"{file}:3: not JSON" in result.output.replace("\n", "")


def test_the_command_explains_what_it_cannot_do(write, tmp_path):
    missing = str(tmp_path / "missing.jsonl")
    result = CliRunner().invoke(app, ["trace", missing])
    assert result.exit_code == 2
    assert f"lynx trace: {missing}: No such file" in result.output
    good = str(write("p", *prefill()))
    result = CliRunner().invoke(app, ["trace", good, "-o", str(tmp_path / "no" / "trace.json")])
    assert result.exit_code == 2
    assert "No such file or directory" in result.output
