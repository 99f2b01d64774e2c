# SPDX-License-Identifier: Apache-2.0
"""The report of `lynx bench e2e` as tables and picture."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from rich.box import SIMPLE_HEAD
from rich.table import Table

from lynx_connector.bench.e2e.goals import Outcome, link_name
from lynx_connector.bench.e2e.modes import MODES
from lynx_connector.bench.e2e.rows import Row

_TIMES = ("ttft", "tt8", "tt32", "tt64")
Group = tuple[int, int, str, float]
_COLOURS = {
    "single": "#2f855a",
    "nixl": "#8c8c8c",
    "lynx": "#c53030",
    "lynx-int8": "#2b6cb0",
    "lynx-bf16": "#4a5568",
    "lynx-int4": "#63b3ed",
}


def machine_name() -> str:
    """Processor, cores and memory of this machine."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    memory = psutil.virtual_memory().total / 2**30
    return f"{model}, {psutil.cpu_count()} cores, {memory:.0f} GiB"


def group_of(row: Row) -> Group:
    """What a row is compared within."""
    return row.prompt_tokens, row.concurrency, row.prefill, row.link_mbit


def grouped(rows: Sequence[Row]) -> dict[Group, dict[str, list[Row]]]:
    """Rows by group, then by mode, in the order of the table."""
    order = list(MODES)
    found: dict[Group, dict[str, list[Row]]] = {}

    def place(row: Row) -> tuple[int, int, str, float, int]:
        prompt, at_once, prefill, link = group_of(row)
        return at_once, prompt, prefill, link or float("inf"), order.index(row.mode)

    for row in sorted(rows, key=place):
        found.setdefault(group_of(row), {}).setdefault(row.mode, []).append(row)
    return found


def result_tables(rows: Sequence[Row]) -> list[Table]:
    """A table per group: medians, the worst in brackets where there are several requests."""
    return [_group_table(group, modes) for group, modes in grouped(rows).items()]


def _group_table(group: Group, modes: dict[str, list[Row]]) -> Table:
    prompt, at_once, prefill, link = group
    title = f"{prompt} tokens, {prefill} prefill, {link_name(link)}, {at_once} at once"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1))
    table.add_column("mode", min_width=9)
    for name in ("n", "1st ms", "8th ms", "32nd ms", "64th ms", "step", "drafts", "MB", "CPU s"):
        table.add_column(name, justify="right", no_wrap=True)
    for mode, own in modes.items():
        drafted, accepted = (
            statistics.mean(getattr(row, key) for row in own) for key in ("drafted", "accepted")
        )
        table.add_row(
            *(mode, str(len(own))),
            *(_median_worst([getattr(row, f"{key}_ms") for row in own]) for key in _TIMES),
            f"{statistics.median(row.decode_step_ms for row in own):.0f}",
            f"{accepted:.0f}/{drafted:.0f}" if drafted else "",
            f"{statistics.median(row.wire_bytes for row in own) / 1e6:.1f}",
            f"{statistics.median(row.cpu_s for row in own):.1f}",
        )
    return table


def _median_worst(values: Sequence[float]) -> str:
    middle = f"{statistics.median(values):,.0f}"
    return f"{middle} ({max(values):,.0f})" if len(values) > 1 else middle


def goals_table(found: Sequence[Outcome]) -> Table:
    """Every goal with what was measured."""
    table = Table(title="Goals", title_justify="left")
    for title in ("goal", "where", "measured", "at most", ""):
        table.add_column(title, justify="right" if title in ("measured", "at most") else "left")
    for one in found:
        verdict = "[green]met[/]" if one.met else "[red]missed[/]"
        table.add_row(one.goal, one.where, f"{one.value:.2f}", f"{one.limit:.2f}", verdict)
    return table


def save_png(rows: Sequence[Row], file: Path, title: str) -> None:
    """Draw the median time to the 32nd token by link, a panel for each kind of request.

    Raises OSError.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = grouped(rows)
    panels = list(dict.fromkeys((group[0], group[1], group[2]) for group in groups))
    columns = min(len(panels), 3)
    lines = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, squeeze=False, figsize=(4.6 * columns, 3.6 * lines)
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for panel, axis in zip(panels, axes.flat, strict=False):
        here = {group[3]: modes for group, modes in groups.items() if group[:3] == panel}
        _draw(axis, here)
        prompt, at_once, prefill = panel
        axis.set_title(f"{prompt} tokens, {at_once} at once, {prefill}", fontsize=10)
    axes[0, 0].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def _draw(axis: Any, by_link: dict[float, dict[str, list[Row]]]) -> None:
    names = [f"{link:g}" if link else "no limit" for link in by_link]
    for mode in MODES:
        points = [
            (place, statistics.median(row.tt32_ms for row in modes[mode]) / 1000)
            for place, modes in enumerate(by_link.values())
            if mode in modes
        ]
        if points:
            axis.plot(*zip(*points, strict=True), "o-", label=mode, color=_COLOURS[mode])
    axis.set_xticks(range(len(names)), names)
    axis.set_xlabel("link, Mbit/s")
    axis.set_ylabel("32nd token, s")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
