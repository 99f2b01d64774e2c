# SPDX-License-Identifier: Apache-2.0
"""`python3 -m scripts.setup`, in the project's folder: runs the steps that have not been done."""

import sys

from . import machine
from .base import SetupError


def main() -> None:
    """Run the steps whose stamp is not there."""
    if sys.version_info < machine.MIN_PYTHON:
        machine.use_newer_python()
    if not sys.platform.startswith("linux"):
        raise SetupError(f"Lynx runs on Linux (vLLM's requirement); this is {sys.platform}.")

    # Not before: Python 3.6 cannot import them.
    from .lock import only_one
    from .stamps import run_steps
    from .steps import steps_for

    with only_one():
        kind = machine.machine_kind()
        run_steps(steps_for(kind), kind)


if __name__ == "__main__":
    try:
        main()
    except SetupError as error:
        sys.exit(f"set-up: {error}")
    except KeyboardInterrupt:
        sys.exit("\nset-up: stopped; run it again to go on")
