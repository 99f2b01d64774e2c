# SPDX-License-Identifier: Apache-2.0
"""What all parts of the set-up share: where things lie, and its error."""

import os

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
VENV = os.path.join(ROOT, ".venv")
#: The environment's own interpreter, not the one that runs the set-up.
PYTHON = os.path.join(VENV, "bin", "python")


class SetupError(Exception):
    """Set-up cannot go on; the message says what is missing and how to get it."""


def say(line: str) -> None:
    """Print a line at once, also into a pipe."""
    print(line, flush=True)


def file_text(name: str) -> str:
    """The text of a file of the project."""
    with open(os.path.join(ROOT, name)) as file:
        return file.read()
