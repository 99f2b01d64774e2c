# SPDX-License-Identifier: Apache-2.0
"""`lynx serve`: become `vllm serve` with the right flags."""

from __future__ import annotations

import os
import shlex
import sys
from typing import NoReturn

import typer

from lynx_connector.testbed.launch import Role, is_cpu_build, serve_command


def run(role: Role, model: str, vllm_args: list[str]) -> NoReturn:
    """Print the command and replace this process by it."""
    if model.startswith("-"):
        typer.secho(
            "lynx serve: MODEL comes right after the role, before any flag", fg="red", err=True
        )
        raise typer.Exit(2)
    try:
        command = serve_command(role, model, vllm_args, cpu=is_cpu_build())
    except FileNotFoundError as error:
        typer.secho(f"lynx serve: {error}", fg="red", err=True)
        raise typer.Exit(2) from None
    print(shlex.join(command), flush=True)
    sys.stderr.flush()
    os.execv(command[0], command)
