# SPDX-License-Identifier: Apache-2.0
"""The report of `lynx bench codec` as table, picture and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

_COLUMNS = (
    # title, key, format
    ("codec", "codec", "{}"),
    ("anchor bits", "anchor_bits", "{:.2f}"),
    ("total bits", "total_bits", "{:.2f}"),
    ("K vNMSE anchor", "vnmse_k_anchor", "{:.1e}"),
    ("V vNMSE anchor", "vnmse_v_anchor", "{:.1e}"),
    ("K vNMSE", "vnmse_k", "{:.1e}"),
    ("V vNMSE", "vnmse_v", "{:.1e}"),
    ("KL", "kl", "{:.5f}"),
    ("accepted of 24", "accepted24", "{:.1f}"),
    ("of 64", "accepted64", "{:.1f}"),
    ("all 24", "full24", "{:.0%}"),
    ("refined of 64", "refined_agree64", "{:.1f}"),
)


def result_table(report: dict[str, Any]) -> Table:
    """All rows; the exact tier's mismatches are in `notes`."""
    table = Table(title=f"{report['model']}, {report['starts']} starts", title_justify="left")
    for title, _, _ in _COLUMNS:
        table.add_column(title, justify="left" if title == "codec" else "right")
    for row in report["rows"]:
        table.add_row(*(form.format(row[key]) for _, key, form in _COLUMNS))
    return table


def notes(report: dict[str, Any], learned: bool) -> list[str]:
    """What the table does not say."""
    lines = [
        f"{report['starts']} starts on {len(report['texts'])} texts; token 0 and the last tokens "
        "of a prompt are exact for every codec and count in the bits, not in the vNMSE",
    ]
    if learned:
        lines.append(
            "klt: tables learned by the product's learner in two folds; each half of the texts is "
            "measured with tables learned from the other half"
        )
    lines += [
        f"{row['codec']}: {row['exact_mismatches']} elements differ after the exact tier"
        for row in report["rows"]
        if "exact_mismatches" in row
    ]
    return lines


def save_json(report: dict[str, Any], file: Path) -> None:
    """Write the report. Raises OSError."""
    file.write_text(json.dumps(report, indent=2) + "\n")


def save_png(report: dict[str, Any], file: Path) -> None:
    """Draw KL and accepted tokens of the drafts against the anchor's bits. Raises OSError."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # Codecs without an error have no place on a logarithmic axis, and take the room of the others.
    rows = [row for row in report["rows"] if row["kl"] > 1e-9 and "exact_mismatches" not in row]
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.6))
    _scatter(panels[0], rows, "kl", "KL(bf16 || draft), nats per token")
    panels[0].set_yscale("log")
    _scatter(panels[1], rows, "accepted24", "drafts accepted of 24")
    panels[1].set_ylim(0, 24.5)
    figure.suptitle(f"{report['model']}, {report['starts']} starts: the anchor alone", fontsize=11)
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def _scatter(panel: Any, rows: Sequence[dict[str, Any]], key: str, label: str) -> None:
    klt = sorted((r for r in rows if r["codec"].startswith("klt")), key=lambda r: r["anchor_bits"])
    panel.plot([r["anchor_bits"] for r in klt], [r[key] for r in klt], color="#c53030", alpha=0.5)
    # Neighbours' names go to different sides, since their points lie close together.
    for number, row in enumerate(sorted(rows, key=lambda r: r["anchor_bits"])):
        colour = "#c53030" if row["codec"].startswith("klt") else "#2b6cb0"
        right = number % 2 == 0
        panel.plot(row["anchor_bits"], row[key], marker="o", color=colour)
        panel.annotate(
            row["codec"],
            (row["anchor_bits"], row[key]),
            xytext=(7, 1) if right else (-7, -6),
            textcoords="offset points",
            ha="left" if right else "right",
            fontsize=8,
        )
    panel.set_xscale("log", base=2)
    panel.set_xticks(ticks := range(3, 10), [str(tick) for tick in ticks])
    panel.minorticks_off()
    panel.set_xlabel("anchor, bits an element with scales and exact tokens")
    panel.set_ylabel(label)
    panel.margins(x=0.2)
    panel.grid(alpha=0.3)
