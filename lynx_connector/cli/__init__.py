# SPDX-License-Identifier: Apache-2.0
"""The command `lynx`. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lynx_connector.launch import Role

app = typer.Typer(
    name="lynx",
    help="Speculative start for disaggregated vLLM: servers, demo and checks.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
)

_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command()
def demo(
    link_mbit: Annotated[
        float, typer.Option(min=0, help="Rate of the link in Mbit/s; 0 for no limit.")
    ] = 200,
    out: Annotated[
        Path,
        typer.Option(help="Folder for demo-report.json, demo-timeline.png and demo-logs/."),
    ] = Path("."),
    model: Annotated[
        str | None, typer.Option(help="Model folder or hub name; default: a small one, fetched.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="vLLM's dtype; only float32 is sure to give equal tokens.")
    ] = "float32",
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 3400,
    output_tokens: Annotated[int, typer.Option(min=1)] = 64,
    namespaces: Annotated[
        bool, typer.Option(help="Put the servers into network namespaces where allowed (root).")
    ] = True,
) -> None:
    """Two vLLM servers and a router here: one long prompt, speculative start against blocking."""
    from lynx_connector.cli.run_demo import run

    run(link_mbit, out, model, dtype, prompt_tokens, output_tokens, namespaces)


@app.command(context_settings=_PASS_ON)
def serve(
    context: typer.Context,
    role: Annotated[Role, typer.Argument(help="What this instance does.")],
    model: Annotated[str, typer.Argument(help="Model folder or hub name.")],
) -> None:
    """Run `vllm serve MODEL` with the flags that the role needs. Any flag of vLLM may follow."""
    from lynx_connector.cli.run_serve import run

    run(role, model, context.args)


@app.command()
def doctor(
    peer: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Also check that this prefill's Lynx port answers."),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="JSON instead of lines.")] = False,
) -> None:
    """Check this machine: versions, UCX, memory, ports, and a peer. Exit status 1 if one fails."""
    from lynx_connector.cli.run_doctor import run

    run(peer, json_output)
