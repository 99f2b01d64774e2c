# SPDX-License-Identifier: Apache-2.0
"""The predictions of `lynx plan` as rows, table and picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from lynx_connector.plan import Mode, Setting, paper, predict


def renamed(mode: Mode, name: str) -> Mode:
    """The mode under another name."""
    return dataclasses.replace(mode, name=name)


def row(setting: Setting, mode: Mode, token: int) -> dict[str, Any]:
    """One prediction, in seconds from the prefill's begin."""
    found = predict(setting, mode)
    return {
        "tokens": setting.tokens,
        "link_mbit": setting.link_mbit,
        "mode": mode.name,
        "ttft_s": round(found.first_s, 4),
        "token_s": round(found.token_s(token), 4),
        "drafted": round(found.drafted, 1),
        "accepted": round(found.accepted, 1),
        "wire_bytes": round(found.wire_bytes),
    }


def prediction_table(report: dict[str, Any]) -> Table:
    """A line a mode and prompt length; a pair of columns a link rate."""
    rates = list(dict.fromkeys(one["link_mbit"] for one in report["rows"]))
    title = f"{report['model']}: seconds to the first and to token {report['token']}"
    table = Table(title=title, title_justify="left")
    for column in ("tokens", "mode", *(f"{rate:g} Mbit/s" for rate in rates)):
        table.add_column(column, justify="left" if column == "mode" else "right")
    cells: dict[tuple[int, str], list[str]] = {}
    for one in report["rows"]:
        cell = f"{one['ttft_s']:.2f}  {one['token_s']:.2f}"
        cells.setdefault((one["tokens"], one["mode"]), []).append(cell)
    for (tokens, mode), values in cells.items():
        table.add_row(str(tokens), mode, *values)
    return table


def notes(report: dict[str, Any]) -> list[str]:
    """Crossing points in words, and what the figures leave out."""
    lines = []
    for one in report["crossings"]:
        stretches = one["best"]
        words = [f"{stretches[0]['mode']}"]
        words += [f"{s['mode']} from {s['from_mbit']:,.0f} Mbit/s" for s in stretches[1:]]
        kept = "" if one["cache_kept"] == "any" else ", cache of 8 bits or more"
        lines.append(
            f"soonest token {report['token']} at {one['tokens']} tokens{kept}: {', '.join(words)}"
        )
    lines.append(
        f"{report['kv_bytes_per_token']:,} bytes of KV a token and worker; int4 leaves a cache of "
        "4 bits; crossing points compare blocking transfers with lynx's drafts alone"
    )
    return lines


def paper_report(setting: Setting) -> dict[str, Any]:
    """The paper's rows, published and predicted."""
    rows = []
    for name, mode in paper.modes().items():
        found, published = predict(setting, mode), paper.PUBLISHED[name]
        rows.append(
            {
                "mode": name,
                "fitted": name in ("BF16", "INT8"),
                "ttft_s": round(found.first_s, 3),
                "token_s": round(found.token_s(paper.TOKEN), 3),
                "published_ttft_s": published.first_s,
                "published_token_s": published.later_s,
            }
        )
    return {
        "model": "Qwen3-32B, 16K tokens",
        "token": paper.TOKEN,
        "link_mbit": setting.link_mbit,
        "step_ms": setting.step_ms,
        "overhead_ms": setting.overhead_ms,
        "rows": rows,
    }


def paper_table(report: dict[str, Any]) -> Table:
    """Published beside predicted."""
    table = Table(title=f"{report['model']} (arXiv 2607.01831)", title_justify="left")
    for column in ("", "first token, paper", "predicted", "", "32nd token, paper", "predicted", ""):
        table.add_column(column, justify="right")
    for one in report["rows"]:
        cells = [one["mode"] + (" (fitted)" if one["fitted"] else "")]
        for key in ("ttft_s", "token_s"):
            published = one[f"published_{key}"]
            error = one[key] / published - 1
            cells += [f"{published:.1f} s", f"{one[key]:.2f} s", f"{error:+.0%}"]
        table.add_row(*cells)
    return table


def save_png(
    report: dict[str, Any], settings: Sequence[Setting], modes: Sequence[Mode], file: Path
) -> None:
    """Draw both times against the link rate, a row of panels a prompt length. Raises OSError."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rates = [10 ** (1 + number / 20) for number in range(81)]
    token = report["token"]
    figure, panels = pyplot.subplots(
        len(settings), 2, figsize=(11, 4.4 * len(settings)), squeeze=False
    )
    for setting, (first, later) in zip(settings, panels, strict=True):
        for mode in modes:
            found = [predict(dataclasses.replace(setting, link_mbit=r), mode) for r in rates]
            style = "-" if mode.drafts else "--"
            first.plot(rates, [one.first_s for one in found], style, label=mode.name)
            later.plot(rates, [one.token_s(token) for one in found], style, label=mode.name)
        for panel, what in ((first, "first token"), (later, f"token {token}")):
            panel.set_xscale("log")
            panel.set_yscale("log")
            panel.set_xlabel("link, Mbit/s")
            panel.set_ylabel(f"{what}, s")
            panel.set_title(f"{setting.tokens} tokens", fontsize=10)
            panel.grid(alpha=0.3)
        later.legend(fontsize=8)
    figure.suptitle(f"{report['model']}: predicted", fontsize=11)
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    pyplot.close(figure)
