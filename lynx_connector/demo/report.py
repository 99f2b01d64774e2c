# SPDX-License-Identifier: Apache-2.0
"""The demo's figures: `demo-report.json` and the table of both runs."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

from rich.table import Table

from lynx_connector.testbed.client import Answer
from lynx_connector.testbed.link import Link
from lynx_connector.testbed.trace import Trace

LATE_TOKEN = 32
"""The token whose time stands for "the answer is well under way", as in the paper."""


class IncompleteRunError(RuntimeError):
    """A run left too few events to be reported; the message names the one that is missing."""


def build_report(
    link: Link,
    model: str,
    elements_per_token: int,
    lynx: tuple[Trace, Answer],
    blocking: tuple[Trace, Answer],
) -> dict[str, Any]:
    """The report of both runs.

    Raises:
        IncompleteRunError: an event that it needs is missing.
    """
    trace, answer = lynx
    for name in ("prefilled", "admitted", "anchor_landed", "refined", "verified"):
        if trace.find(name) is None:
            raise IncompleteRunError(
                f"the speculative run left no {name!r} event: it did not start on the anchor"
            )
    if blocking[0].reply is None:
        raise IncompleteRunError("the blocking run left no 'prefilled' event")
    wire = {tier: trace.wire_bytes.get(tier, 0) for tier in ("anchor", "residual")}
    prompt_tokens = trace.value("admitted", "prompt_tokens")
    sent_tokens = prompt_tokens - trace.value("admitted", "local_tokens", 0)
    bits_per_byte = 8 / (sent_tokens * elements_per_token)
    return {
        "link_mbit": link.mbit,
        "link": {"kind": link.kind, "note": link.note},
        "model": Path(model).name,
        "prompt_tokens": prompt_tokens,
        "output_tokens": len(answer.token_ids),
        "bits_per_element": {
            "anchor": wire["anchor"] * bits_per_byte,
            "total": sum(wire.values()) * bits_per_byte,
        },
        "wire_bytes": wire,
        "lynx": _latencies(trace, answer),
        "blocking": _latencies(*blocking),
        "drafted": trace.value("verified", "drafted"),
        "accepted": trace.value("verified", "accepted"),
        "verification_ms": trace.value("verified", "ms"),
        "same_tokens_as_blocking": answer.token_ids == blocking[1].token_ids,
        "text": answer.text,
        "versions": _versions(),
    }


def _latencies(trace: Trace, answer: Answer) -> dict[str, float | None]:
    def rounded(value: float | None) -> float | None:
        return None if value is None else round(value, 1)

    started, replied = trace.time("prefill_started"), trace.reply
    prefill = None if started is None or replied is None else (replied - started) * 1000
    landed, refined = trace.time("anchor_landed"), trace.time("refined")
    after_reply = {
        name: None if at is None or replied is None else rounded((at - replied) * 1000)
        for name, at in (("anchor_ms", landed), ("refined_ms", refined))
    }
    return {
        "ttft_ms": rounded(trace.token_after_reply_ms(1)),
        f"tt{LATE_TOKEN}_ms": rounded(trace.token_after_reply_ms(LATE_TOKEN)),
        "last_token_ms": rounded(trace.token_after_reply_ms(len(answer.token_ids))),
        "prefill_ms": rounded(prefill),
        **after_reply,
    }


def _versions() -> dict[str, str]:
    names = ["lynx-connector", "vllm", "torch", "vllm-router", "ucxx-cu13", "ucxx-cu12"]
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def comparison_table(report: dict[str, Any]) -> Table:
    """Both runs side by side."""
    table = Table(title="Milliseconds after the prefill's reply", title_justify="left")
    table.add_column("")
    table.add_column("speculative start", justify="right")
    table.add_column("blocking", justify="right")
    rows = {
        "anchor landed": "anchor_ms",
        "cache refined": "refined_ms",
        "first token": "ttft_ms",
        f"token {LATE_TOKEN}": f"tt{LATE_TOKEN}_ms",
        "last token": "last_token_ms",
    }
    for title, key in rows.items():
        values = [report[run][key] for run in ("lynx", "blocking")]
        table.add_row(title, *("-" if value is None else f"{value:,.0f}" for value in values))
    return table


def summary_lines(report: dict[str, Any]) -> list[str]:
    """What the table does not say."""
    bits, wire = report["bits_per_element"], report["wire_bytes"]
    return [
        f"{report['prompt_tokens']} prompt tokens, {report['output_tokens']} output tokens; "
        f"link: {report['link']['note']}",
        f"anchor {wire['anchor'] / 1e6:.1f} MB ({bits['anchor']:.2f} bits per element), "
        f"residual {wire['residual'] / 1e6:.1f} MB ({bits['total']:.2f} bits in all)",
        f"{report['drafted']} tokens drafted while the residual travelled, "
        f"{report['accepted']} accepted, verified in {report['verification_ms']:.0f} ms",
        "both answers are token for token the same"
        if report["same_tokens_as_blocking"]
        else "the answers DIFFER",
    ]
