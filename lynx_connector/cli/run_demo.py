# SPDX-License-Identifier: Apache-2.0
"""`lynx demo`: the demo with its errors said in one line and its end made sure."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

import typer
from rich.console import Console

from lynx_connector.demo.report import IncompleteRunError
from lynx_connector.demo.runner import DemoError, DemoOptions, run_demo
from lynx_connector.testbed.client import RequestError
from lynx_connector.testbed.model import ModelError
from lynx_connector.testbed.process import ServerError
from lynx_connector.testbed.prompt import PromptError

_INTERRUPTED = 130


def run(
    link_mbit: float,
    out: Path,
    model: str | None,
    dtype: str,
    prompt_tokens: int,
    output_tokens: int,
    namespaces: bool,
) -> None:
    """Run the demo; exit status 1 where its result is wrong or it could not run."""
    console = Console()
    # A closed terminal and a plain kill clean up as Ctrl-C does.
    for name in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, _interrupt)
    options = DemoOptions(
        out.resolve(), link_mbit, model, dtype, prompt_tokens, output_tokens, namespaces
    )
    try:
        report = run_demo(options, console)
    except (
        DemoError,
        FileNotFoundError,
        IncompleteRunError,
        ModelError,
        PromptError,
        RequestError,
        ServerError,
    ) as error:
        message = f"lynx demo: {error}"
        console.print(message, style="red", markup=False, highlight=False, soft_wrap=True)
        console.print(f"logs: {options.logs}", highlight=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print("lynx demo: stopped; servers and link are removed")
        raise typer.Exit(_INTERRUPTED) from None
    lynx, blocking = (report[name]["tt32_ms"] for name in ("lynx", "blocking"))
    if lynx is not None and lynx >= blocking:
        console.print(
            "The speculative start was not faster this time: a busy machine, or too fast a link "
            "(try --link-mbit 100).",
            style="yellow",
        )


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
