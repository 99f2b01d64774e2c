# SPDX-License-Identifier: Apache-2.0
"""What the terminal shows while the demo runs."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lynx_connector.testbed.client import Answer
from lynx_connector.testbed.trace import EventTail, Trace

_TEXT_CHARACTERS = 600


@dataclass
class Run:
    """One request on the screen."""

    label: str
    since: float = 0.0
    """Unix time at which it was sent; 0 before."""
    answer: Answer = field(default_factory=Answer)
    ended: bool = False

    def trace(self, tail: EventTail) -> Trace | None:
        """Its events so far."""
        return Trace.latest(self.label, tail.poll(), self.since) if self.since else None

    def state(self, trace: Trace | None) -> str:
        """One word or two for where it is."""
        if not self.since:
            return "waiting"
        if self.ended:
            return "finished"
        if self.answer.token_ids:
            return "answering"
        steps = (
            ("verify_started", "verifying"),
            ("drafting", "drafting"),
            ("anchor_landed", "anchor landed"),
            ("admitted", "receiving"),
            ("prefilled", "prefill done"),
            ("prefill_started", "prefill"),
        )
        found = (words for name, words in steps if trace and trace.find(name))
        return next(found, "sent")


class LiveView:
    """A live view of servers and runs; on anything but a terminal, one line per change."""

    def __init__(self, console: Console):
        self._console = console
        self._terminal = console.is_terminal
        self._started = time.monotonic()
        self._headline = ""
        self._runs: list[Run] = []
        self._tail: EventTail | None = None
        self._states: dict[str, str] = {}
        self._live = Live(
            console=console, get_renderable=self._render, refresh_per_second=5, transient=True
        )

    def __enter__(self) -> LiveView:
        if self._terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._terminal:
            self._live.stop()

    def headline(self, text: str) -> None:
        """What is going on as a whole."""
        if text != self._headline:
            self._headline = text
            if not self._terminal:
                seconds = time.monotonic() - self._started
                self._console.print(f"{seconds:4.0f} s  {text}", soft_wrap=True)

    def show(self, runs: list[Run], tail: EventTail) -> None:
        """Show these runs from now on."""
        self._runs, self._tail = runs, tail

    def changed(self) -> None:
        """Off a terminal, say a run's new state; a terminal is refreshed by itself."""
        if self._terminal or self._tail is None:
            return
        for run in self._runs:
            state = run.state(run.trace(self._tail))
            if self._states.get(run.label, "waiting") != state:
                self._states[run.label] = state
                self.headline(f"{run.label}: {state}")

    def _render(self) -> RenderableType:
        seconds = time.monotonic() - self._started
        parts: list[RenderableType] = [Text(f"{seconds:4.0f} s  {self._headline}", style="bold")]
        if self._tail is not None:
            table = Table(box=None, padding=(0, 2))
            for title in ("request", "state", "anchor", "residual", "drafts", "tokens"):
                table.add_column(
                    title, justify="left" if title in ("request", "state") else "right"
                )
            for run in self._runs:
                table.add_row(run.label, *_figures(run, run.trace(self._tail)))
            parts.append(table)
            texts = [run.answer.text for run in self._runs if run.answer.text]
            if texts:
                parts.append(
                    Panel(texts[-1][-_TEXT_CHARACTERS:], title="answer", title_align="left")
                )
        return Group(*parts)


def _figures(run: Run, trace: Trace | None) -> list[str]:
    state = run.state(trace)
    if trace is None:
        return [state, "", "", "", ""]
    prompt = trace.value("admitted", "prompt_tokens")
    tiers = []
    for tier in ("anchor", "residual"):
        if trace.wire_bytes.get(tier):
            tiers.append(f"{trace.wire_bytes[tier] / 1e6:.1f} MB")
            continue
        done = [
            event["tokens_done"]
            for event in trace.events
            if event["event"] in ("frame", "patched") and event.get("tier") == tier
        ]
        tiers.append(f"{100 * max(done) / prompt:.0f} %" if done and prompt else "")
    drafted = trace.value("verified", "drafted", trace.value("verify_started", "drafts"))
    accepted = trace.value("verified", "accepted")
    drafts = "" if drafted is None else str(drafted)
    if accepted is not None:
        drafts += f", {accepted} right"
    return [state, *tiers, drafts, str(len(run.answer.token_ids))]
