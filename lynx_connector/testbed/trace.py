# SPDX-License-Identifier: Apache-2.0
"""What happened to one request, read from the events files of both servers."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from lynx_connector.telemetry.trace import Event, Span, Timeline, parse_lines


class EventTail:
    """Reads events files as they grow; any thread may poll."""

    def __init__(self, files: Iterable[Path]):
        self._lock = threading.Lock()
        self._offsets = dict.fromkeys(files, 0)
        self._events: list[Event] = []
        self.unreadable = 0
        """Lines that were no events and were passed over."""

    def poll(self) -> list[Event]:
        """Read what is new; returns all events so far. A line still being written waits."""
        with self._lock:
            for file, offset in self._offsets.items():
                try:
                    with file.open("rb") as stream:
                        stream.seek(offset)
                        data = stream.read()
                except FileNotFoundError:
                    continue
                whole = data[: data.rfind(b"\n") + 1]
                self._offsets[file] = offset + len(whole)
                events, bad = parse_lines(whole)
                self._events += events
                self.unreadable += len(bad)
            return list(self._events)


@dataclass
class Trace(Timeline):
    """The events of one transfer, and when its tokens reached the client."""

    label: str
    events: list[Event]
    token_times: list[float] = field(default_factory=list)

    @classmethod
    def latest(cls, label: str, events: list[Event], since: float) -> Trace | None:
        """The transfer that began first after the Unix time `since`; None where none has."""
        for event in sorted(events, key=lambda event: event["t"]):
            if event["t"] >= since and event["event"] == "prefill_started":
                transfer = event["transfer"]
                return cls(label, [e for e in events if e.get("transfer") == transfer])
        return None

    @property
    def reply(self) -> float | None:
        """When the prefill ended: the zero of every latency."""
        return self.time("prefilled")

    @property
    def wire_bytes(self) -> dict[str, int]:
        """Payload received, by tier."""
        for name in ("refined", "anchor_landed"):
            if event := self.find(name):
                return dict(event.get("wire_bytes", {}))
        return {}

    def token_after_reply_ms(self, number: int) -> float | None:
        """Milliseconds from the prefill's reply to the client's `number`-th token (from 1)."""
        if self.reply is None or len(self.token_times) < number:
            return None
        return (self.token_times[number - 1] - self.reply) * 1000

    def spans(self) -> list[Span]:
        """The phases that are over, in the order in which they begin."""
        if self.find("anchor_landed"):
            last_tier = ("residual", "anchor_landed", "refined")
        else:
            last_tier = ("both tiers", "admitted", "refined")
        phases = [
            ("prefill", "prefill_started", "prefilled"),
            ("anchor", "admitted", "anchor_landed"),
            last_tier,
            ("drafts", "drafting", "verify_started"),
            ("verification", "verify_started", "verified"),
        ]
        spans = []
        for name, first, last in phases:
            start, end = self.time(first), self.time(last)
            if start is not None and end is not None and end >= start:
                spans.append(Span(name, start, end))
        return spans
