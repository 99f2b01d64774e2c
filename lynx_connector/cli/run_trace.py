# SPDX-License-Identifier: Apache-2.0
"""`lynx trace`: events files to a picture for Chrome or Perfetto."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import typer

from lynx_connector.telemetry.trace import TraceError, read_events, to_chrome


def run(files: Sequence[Path], out: Path) -> None:
    """Write the trace; exit status 2 with one line for bad input."""
    try:
        events = read_events(files)
        trace = to_chrome(events)
        out.write_text(json.dumps(trace))
    except TraceError as error:
        typer.secho(f"lynx trace: {error}", fg="red", err=True)
        raise typer.Exit(2) from None
    except OSError as error:
        typer.secho(f"lynx trace: {out}: {error.strerror}", fg="red", err=True)
        raise typer.Exit(2) from None
    if events.unreadable:
        typer.secho(
            f"lynx trace: {events.unreadable} lines could not be read and were passed over, "
            f"the first: {events.why}",
            fg="yellow",
            err=True,
        )
    transfers = {event["transfer"] for event in events if event.get("transfer")}
    typer.echo(f"{len(transfers)} requests in {out}: open it in https://ui.perfetto.dev")
