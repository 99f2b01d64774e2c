# SPDX-License-Identifier: Apache-2.0
"""One row per request: its schema, and how times become figures."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from lynx_connector.bench.e2e.cells import Cell
from lynx_connector.bench.errors import BenchError

#: A start on the anchor can give 1 token from the prefill, 64 drafts and a bonus token at a time:
#: the steps behind them are ordinary ones.
OUTPUT_TOKENS = 72
_TAIL_STEPS = 6
_SUMMARY = ("ttft_ms", "tt32_ms")


@dataclass(frozen=True)
class Row:
    """One request. Times in milliseconds since its prefill was complete."""

    mode: str
    link_mbit: float
    """0: unlimited."""
    prompt_tokens: int
    prefill: str
    concurrency: int
    repeat: int
    ttft_ms: float
    tt8_ms: float
    tt32_ms: float
    tt64_ms: float
    decode_step_ms: float
    drafted: int
    accepted: int
    wire_bytes: int
    """The request's share of what crossed the link while its cell ran."""
    cpu_s: float
    """The request's share of the CPU time of the mode's servers, prefill included."""


def summary(rows: Sequence[Row]) -> str:
    """The rows of one mode and cell in a line, their times as medians."""
    row = rows[0]
    link = f"{row.link_mbit:g} Mbit/s" if row.link_mbit else "unlimited"
    first, later = (statistics.median(getattr(r, key) for r in rows) for key in _SUMMARY)
    return (
        f"{row.mode}, {row.prompt_tokens} tokens {row.prefill}, {link}, {row.concurrency} at "
        f"once: 1st token {first:,.0f} ms, 32nd {later:,.0f} ms"
    )


def make_row(
    mode: str,
    cell: Cell,
    zero: float,
    token_times: Sequence[float],
    drafts: tuple[int, int],
    wire_bytes: int,
    cpu_s: float,
) -> Row:
    """A row from Unix times. `drafts`: (drafted, accepted).

    Raises:
        BenchError: fewer tokens came than were asked for.
    """
    if len(token_times) < OUTPUT_TOKENS:
        raise BenchError(f"mode {mode}: {len(token_times)} of {OUTPUT_TOKENS} tokens came")

    def after(number: int) -> float:
        return round((token_times[number - 1] - zero) * 1000, 1)

    # The mean: a client that is late for one token finds two, and a median would say 0.
    step = (token_times[-1] - token_times[-1 - _TAIL_STEPS]) / _TAIL_STEPS
    return Row(
        mode,
        cell.link_mbit,
        cell.prompt_tokens,
        cell.prefill,
        cell.concurrency,
        cell.repeat,
        ttft_ms=after(1),
        tt8_ms=after(8),
        tt32_ms=after(32),
        tt64_ms=after(64),
        decode_step_ms=round(step * 1000, 1),
        drafted=drafts[0],
        accepted=drafts[1],
        wire_bytes=wire_bytes,
        cpu_s=round(cpu_s, 2),
    )


def to_report(machine: str, model: str, rows: Sequence[Row]) -> dict[str, Any]:
    """What `--json` writes."""
    return {"machine": machine, "model": model, "rows": [asdict(row) for row in rows]}


def cell_of(row: Row) -> tuple[str, Cell]:
    """The mode and the measurement that a row is of."""
    cell = Cell(row.link_mbit, row.prompt_tokens, row.prefill, row.concurrency, row.repeat)
    return row.mode, cell


def from_report(report: dict[str, Any]) -> list[Row]:
    """The rows of a report.

    Raises:
        BenchError: it has none, or a row has other keys than it should.
    """
    names = {field.name for field in fields(Row)}
    if not isinstance(report.get("rows"), list):
        raise BenchError("no rows")
    for number, row in enumerate(report["rows"]):
        if row.keys() != names:
            raise BenchError(
                f"row {number}: keys differ in {', '.join(sorted(row.keys() ^ names))}"
            )
    return [Row(**row) for row in report["rows"]]
