# SPDX-License-Identifier: Apache-2.0
"""The environment's pip: a short progress on screen, everything in the log, errors explained."""

from __future__ import annotations

import os
import platform
import subprocess

from .base import PYTHON, VENV, SetupError
from .progress import Progress

LOG = os.path.join(VENV, "lynx-setup.log")


class PipError(SetupError):
    """pip failed; `output` is what it said."""

    def __init__(self, message: str, output: str) -> None:
        super().__init__(message)
        self.output = output


def pip(*arguments: str) -> None:
    """Run the environment's pip; a short progress on screen, everything in the log."""
    # --user and externally-managed settings of the outer Python have no place in a venv.
    environment = dict(
        os.environ, PIP_USER="0", PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_PROGRESS_BAR="off"
    )
    environment.pop("PYTHONHOME", None)
    lines = []
    with open(LOG, "a") as log:
        log.write(f"$ pip {' '.join(arguments)}\n")
        process = subprocess.Popen(
            [PYTHON, "-m", "pip", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        progress = Progress()
        try:
            for line in process.stdout or ():
                log.write(line)
                lines.append(line)
                progress.take(line)
        finally:
            if process.poll() is None:
                # Here on Ctrl-C too: pip then has had the same signal.
                try:
                    process.wait(timeout=30)
                except subprocess.TimeoutExpired:
                    process.kill()
            progress.end()
    if process.wait():
        output = "".join(lines)
        raise PipError(explain_pip("".join(lines[-12:]), output), output)


def explain_pip(tail: str, output: str) -> str:
    """The end of pip's output, and what to do about it."""
    lower = output.lower()
    if "no space left" in lower:
        remedy = "The disk is full: free some space (pip also unpacks in $TMPDIR) and try again."
    elif any(sign in lower for sign in ("newconnectionerror", "name resolution", "timed out")):
        remedy = "The package index is out of reach: check the network and pip's index settings."
    elif "no matching distribution" in lower:
        remedy = (
            "The package index has no build for this machine: "
            f"{platform.machine()}, Python {platform.python_version()}."
        )
    else:
        remedy = f"pip's whole output is in {LOG}."
    return f"pip failed:\n{tail.strip()}\n{remedy}"
