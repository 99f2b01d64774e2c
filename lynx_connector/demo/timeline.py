# SPDX-License-Identifier: Apache-2.0
"""A request's timeline as a picture: characters for the terminal, PNG for a page.

Zero is the prefill's reply. The prefill lasts many times longer than what follows, so only its
last part is drawn, and its length said.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from lynx_connector.telemetry.trace import Span
from lynx_connector.testbed.trace import Trace

COLOURS = {
    "prefill": "#8c8c8c",
    "anchor": "#2b6cb0",
    "residual": "#63b3ed",
    "both tiers": "#63b3ed",
    "drafts": "#dd9933",
    "verification": "#c53030",
    "tokens": "#2f855a",
}
_LABEL_COLUMNS = 22
_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)


def time_range(traces: Sequence[Trace]) -> tuple[float, float]:
    """Seconds from the reply that the pictures show: a little of the prefill, all of the rest."""
    ends = [span.end - (trace.reply or 0) for trace in traces for span in trace.spans()]
    ends += [trace.token_times[-1] - (trace.reply or 0) for trace in traces if trace.token_times]
    last = max([*ends, 0.1])
    return -0.08 * last, last


def _rows(trace: Trace) -> list[tuple[str, list[Span]]]:
    """Name and spans of each line of one request; the tokens come as spans of no length."""
    rows = [(f"{span.name} {span.end - span.start:.2f} s", [span]) for span in trace.spans()]
    if trace.token_times:
        tokens = [Span("tokens", at, at) for at in trace.token_times]
        rows.append((f"{len(tokens)} tokens", tokens))
    return rows


def terminal_timeline(traces: Sequence[Trace], columns: int) -> RenderableType:
    """The timelines of `traces` on one time axis, `columns` wide."""
    first, last = time_range(traces)
    width = max(columns - _LABEL_COLUMNS - 1, 20)
    scale = (width - 1) / (last - first)
    lines: list[Text] = []
    for trace in traces:
        lines.append(Text(trace.label, style="bold"))
        for label, spans in _rows(trace):
            cells = [" "] * width
            for span in spans:
                start, end = (
                    min(max(round((at - (trace.reply or 0) - first) * scale), 0), width - 1)
                    for at in (span.start, span.end)
                )
                for column in range(start, end + 1):
                    cells[column] = "│" if span.name == "tokens" else "█"
            line = Text(f"  {label:<{_LABEL_COLUMNS - 2}} ")
            line.append("".join(cells), style=COLOURS[spans[0].name])
            lines.append(line)
    return Group(*lines, _axis(first, last, width, scale))


def _axis(first: float, last: float, width: int, scale: float) -> Text:
    step = next((tick for tick in _TICKS if tick * scale >= 10), _TICKS[-1])
    cells = [" "] * (width + 8)
    tick = 0
    while tick * step <= last:
        column = round((tick * step - first) * scale)
        label = f"{tick * step:g}"
        cells[column : column + len(label)] = label
        tick += 1
    return Text(f"{'seconds from reply':<{_LABEL_COLUMNS}} {''.join(cells).rstrip()}", style="dim")


def save_png(traces: Sequence[Trace], file: Path, title: str) -> None:
    """Draw the timelines of `traces`, one panel each on a common time axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    first, last = time_range(traces)
    figure, panels = pyplot.subplots(
        len(traces), 1, sharex=True, squeeze=False, figsize=(10, 1 + 2.1 * len(traces))
    )
    for trace, panel in zip(traces, panels[:, 0], strict=True):
        rows = _rows(trace)
        reply = trace.reply or 0
        for height, (_, spans) in enumerate(rows):
            colour = COLOURS[spans[0].name]
            if spans[0].name == "tokens":
                panel.vlines(
                    [span.start - reply for span in spans], height - 0.4, height + 0.4, colour
                )
            else:
                bars = [(span.start - reply, span.end - span.start) for span in spans]
                panel.broken_barh(bars, (height - 0.4, 0.8), facecolors=colour)
        panel.axvline(0, color="black", linewidth=0.8, linestyle=":")
        panel.set_yticks(range(len(rows)), [label for label, _ in rows])
        panel.invert_yaxis()
        panel.set_xlim(first, last * 1.02)
        panel.set_title(trace.label, loc="left", fontsize=10)
        panel.grid(axis="x", alpha=0.3)
    panels[-1, 0].set_xlabel("seconds from the prefill's reply")
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    pyplot.close(figure)
