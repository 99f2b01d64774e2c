# SPDX-License-Identifier: Apache-2.0
"""What this machine is: the Python that runs, and whether a GPU is there."""

import os
import platform
import shutil
import subprocess
import sys

from .base import SetupError

MIN_PYTHON = (3, 11)
NEWER_PYTHONS = ("python3.13", "python3.12", "python3.11")


def machine_kind() -> str:
    """ "cpu", or "cu12" / "cu13" where nvidia-smi lists a GPU (by what its driver can run)."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "cpu"
    listed = subprocess.run([tool, "-L"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    if listed.returncode or b"GPU" not in listed.stdout:
        return "cpu"
    shown = subprocess.run([tool], stdout=subprocess.PIPE, text=True).stdout
    return "cu12" if "CUDA Version: 12" in shown else "cu13"


def use_newer_python() -> None:
    """Run again under a newer Python of the PATH, or say that there is none."""
    for name in NEWER_PYTHONS:
        found = shutil.which(name)
        # A pyenv shim exists for versions that are not active, too: see whether it runs.
        if found and subprocess.run([found, "-c", ""], stderr=subprocess.DEVNULL).returncode == 0:
            os.execv(found, [found, "-m", __package__, *sys.argv[1:]])
    raise SetupError(
        f"Python {MIN_PYTHON[0]}.{MIN_PYTHON[1]} or newer is needed, this is "
        f"{platform.python_version()}. Install one and name it: make PYTHON=/path/to/python3"
    )


def own_version() -> str:
    """Major and minor version of the Python that runs, such as "3.11"."""
    return f"{sys.version_info[0]}.{sys.version_info[1]}"
