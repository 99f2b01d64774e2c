# SPDX-License-Identifier: Apache-2.0
"""`lynx doctor`: run every check and show each as one line, red ones with their remedy."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape

from lynx_connector.cli import checks, peer_check
from lynx_connector.cli.checks import Check, Status

_MARKS = {
    Status.GOOD: "[green]ok  [/green]",
    Status.NOTE: "[yellow]note[/yellow]",
    Status.BAD: "[red]BAD [/red]",
}


def run(peer: str | None, secret_file: Path | None, as_json: bool) -> None:
    """Print the checks; exit status 1 where one is bad."""
    probes: list[Callable[[], Iterable[Check]]] = [
        checks.python_version,
        checks.packages,
        checks.imports,
        checks.device,
        checks.memory,
        checks.ucx,
        checks.ports,
        checks.network_tools,
    ]
    if peer is not None:
        probes.append(lambda: peer_check.peer(peer, secret_file))
    console = Console()
    found: list[Check] = []
    for probe in probes:
        for check in probe():
            found.append(check)
            if not as_json:
                _show(console, check)
    bad = [check for check in found if check.status is Status.BAD]
    if as_json:
        print(json.dumps({"good": not bad, "checks": [asdict(check) for check in found]}, indent=2))
    elif bad:
        console.print(f"{len(bad)} of {len(found)} checks are bad", style="red")
    else:
        console.print("ready: nothing that Lynx needs is missing", style="green")
    if bad:
        raise typer.Exit(1)


def _show(console: Console, check: Check) -> None:
    line = f"{_MARKS[check.status]} {check.name:<16} {escape(check.text)}"
    console.print(line, highlight=False, soft_wrap=True)
    if check.remedy:
        line = f"{'':<21} -> {escape(check.remedy)}"
        console.print(line, highlight=False, soft_wrap=True)
