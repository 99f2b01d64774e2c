# SPDX-License-Identifier: Apache-2.0
"""Requests as timelines, from the events files of the instances that served them.

`to_chrome` writes the trace event format of Chrome and Perfetto: a process per instance and role,
rows per request (its phases; encoding; each tier on the wire), an instant for every other event.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lynx_connector.errors import LynxError, shown
from lynx_connector.telemetry.metrics import TIERS

Event = dict[str, Any]

ROWS = ("", "encode", *TIERS)
"""A request's rows, by what is added to its name. Spans of one row do not overlap."""

_IN_SPANS = {"chunk_encoded", "frame_sent", "frame_received", "frame", "patched"}
"""Events that come by the frame or chunk: no instants."""


class TraceError(LynxError):
    """An events file cannot be used: names the file, the line and what is wrong."""


@dataclass(frozen=True)
class Span:
    """A stretch of a request's life, in Unix seconds. `row` is one of `ROWS`."""

    name: str
    start: float
    end: float
    row: str = ""


class Timeline:
    """The events of one transfer, in any order; with several ranks, all of them."""

    def __init__(self, events: list[Event]):
        self.events = events

    def find(self, name: str) -> Event | None:
        """The first event of that name."""
        return next((event for event in self.events if event["event"] == name), None)

    def time(self, name: str) -> float | None:
        """When the first event of that name happened."""
        event = self.find(name)
        return event["t"] if event else None

    def value(self, name: str, field_name: str, default: Any = None) -> Any:
        """A field of the first event of that name."""
        event = self.find(name)
        return event.get(field_name, default) if event else default

    def phases(self) -> Iterator[Span]:
        """All spans that the events tell of, on either side."""
        landed = ("anchor_landed", "refined")
        yield from self._between("prefill", ("prefill_started",), ("prefill_ended", "handoff"))
        yield from self._between("waiting for KV", ("admitted",), landed)
        yield from self._between("drafting", ("drafting",), ("verify_started",))
        yield from self._between("verification", ("verify_started",), ("verified",))
        if self.find("verified") or not self.find("drafting"):
            yield from self._between("decode", ("verified", "refined"), ("finished",))
        for event in self._all("chunk_encoded"):
            yield Span("encode", event["t"] - event["seconds"], event["t"], "encode")
        for tier in TIERS:
            sent = [event for event in self._all("frame_sent") if event["tier"] == tier]
            if sent:
                start = min(event["t"] - event["seconds"] for event in sent)
                yield Span(f"{tier} on the wire", start, sent[-1]["t"], tier)
            came = [event for event in self._all("frame_received") if event["tier"] == tier]
            if came:
                yield Span(f"{tier} arriving", came[0]["t"], came[-1]["t"], tier)

    def _all(self, name: str) -> list[Event]:
        return [event for event in self.events if event["event"] == name]

    def _between(self, name: str, first: Sequence[str], last: Sequence[str]) -> Iterator[Span]:
        """From the first event of the one kind to the last (of all ranks) of the other."""
        starts = next((found for one in first if (found := self._all(one))), [])
        ends = next((found for one in last if (found := self._all(one))), [])
        if starts and ends and ends[-1]["t"] >= starts[0]["t"]:
            yield Span(name, starts[0]["t"], ends[-1]["t"])


class Events(list[Event]):
    """Events of several files, oldest first.

    unreadable: lines that were passed over; why: the first of them, with its file and number.
    """

    unreadable: int = 0
    why: str = ""


def read_events(files: Iterable[Path]) -> Events:
    """All events of the files. A last line that is still being written is left out, and lines that
    are no events (a full disk, a crash) are passed over and counted.

    Raises:
        TraceError: a file is missing or holds no events.
    """
    events = Events()
    for file in files:
        try:
            data = file.read_bytes()
        except OSError as error:
            raise TraceError(f"{file}: {error.strerror}") from None
        found, bad = parse_lines(data[: data.rfind(b"\n") + 1])
        if bad and not events.why:
            events.why = f"{file}:{bad[0]}"
        if not found:
            what = f", {file}:{bad[0]}" if bad else ""
            raise TraceError(f"{file}: no events (is it the events_file of an instance?){what}")
        events += found
        events.unreadable += len(bad)
    events.sort(key=lambda event: event["t"])
    return events


# Quotes are escaped inside JSON strings: only an event begins like that.
_BEGINNING = re.compile(rb'(?=\{"t":)')


def parse_lines(data: bytes) -> tuple[list[Event], list[str]]:
    """Events of whole lines, and for each line that is none "number: what is wrong".

    An event that another process has written behind half a line is found, too.
    """
    events: list[Event] = []
    bad: list[str] = []
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            events.append(_parse(line))
            continue
        except ValueError as error:
            bad.append(f"{number}: {error}")
        for part in _BEGINNING.split(line)[1:]:
            try:
                events.append(_parse(part))
            except ValueError:
                continue
    return events, bad


def _parse(line: bytes) -> Event:
    """Raises ValueError saying why it is no event."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(event, dict):
        raise ValueError("not a JSON object")
    for key, kind in (("t", int | float), ("event", str), ("role", str)):
        if not isinstance(event.get(key), kind):
            raise ValueError(f"not an event of Lynx: {key!r} is {shown(repr(event.get(key)))}")
    return event


def to_chrome(events: Sequence[Event]) -> dict[str, Any]:
    """Trace event format, times in microseconds since the first event.

    Raises:
        TraceError: an event lacks a field that its span is made of.
    """
    zero = min((event["t"] for event in events), default=0.0)
    instances: dict[tuple[str, str], dict[str | None, list[Event]]] = {}
    for event in events:
        instance = instances.setdefault((event["role"], event.get("engine") or ""), {})
        instance.setdefault(event.get("transfer"), []).append(event)
    found: list[Event] = []
    for process, ((role, engine), transfers) in enumerate(instances.items(), 1):
        found.append(_name("process_name", process, 0, f"{role} {engine[:8]}".strip()))
        for index, (transfer, own) in enumerate(transfers.items()):
            try:
                found += _request(process, index, transfer, own, zero)
            except (KeyError, TypeError) as error:
                raise TraceError(f"transfer {transfer}: an event lacks a field: {error}") from None
    return {
        "traceEvents": found,
        "displayTimeUnit": "ms",
        "otherData": {"first_event_unix_seconds": zero},
    }


def _request(
    process: int, index: int, transfer: str | None, events: list[Event], zero: float
) -> Iterator[Event]:
    request = next((event["request"] for event in events if event.get("request")), None)
    name = f"request {request or '?'} ({transfer[:8]})" if transfer else "this instance"
    spans = list(Timeline(events).phases())
    first = index * len(ROWS) + 1
    for row in sorted({span.row for span in spans} | {""}, key=ROWS.index):
        thread = first + ROWS.index(row)
        yield _name("thread_name", process, thread, f"{name} {row}".strip())
        yield {"ph": "M", "pid": process, "tid": thread, "name": "thread_sort_index"} | {
            "args": {"sort_index": thread}
        }
    for span in spans:
        yield {
            "ph": "X",
            "pid": process,
            "tid": first + ROWS.index(span.row),
            "name": span.name,
            "cat": span.row or "phase",
            "ts": round((span.start - zero) * 1e6, 1),
            "dur": round((span.end - span.start) * 1e6, 1),
            "args": {"request": request, "transfer": transfer},
        }
    for event in events:
        if event["event"] not in _IN_SPANS:
            yield {
                "ph": "i",
                "s": "t",
                "pid": process,
                "tid": first,
                "name": event["event"],
                "cat": "event",
                "ts": round((event["t"] - zero) * 1e6, 1),
                "args": {key: value for key, value in event.items() if key != "t"},
            }


def _name(kind: str, process: int, thread: int, name: str) -> Event:
    return {"ph": "M", "pid": process, "tid": thread, "name": kind, "args": {"name": name}}
