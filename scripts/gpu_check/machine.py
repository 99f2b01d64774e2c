# SPDX-License-Identifier: Apache-2.0
"""What this machine is, and what it lacks."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sysconfig
from typing import Any

NEEDED = ("torch", "triton", "numpy")
FOR_BENCH = ("numba", "msgspec", "xxhash", "typer", "rich", "pydantic")
NOT_USED = ("vllm", "ucxx")
"""Of interest for what comes next on the machine."""


def missing(names: tuple[str, ...]) -> list[str]:
    """Those of the packages that cannot be found."""
    return [name for name in names if importlib.util.find_spec(name) is None]


def describe() -> dict[str, Any]:
    """Versions, the card and its driver, None where there is none; what is missing, by name."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": None,
        "triton": None,
        "cuda": None,
        "device": None,
        "capability": None,
        "driver": _driver(),
        "missing": missing(NEEDED + FOR_BENCH + NOT_USED) + _missing_for_launchers(),
    }
    for name in ("torch", "triton"):
        if name not in facts["missing"]:
            facts[name] = importlib.import_module(name).__version__
    if facts["torch"]:
        import torch

        facts["cuda"] = torch.version.cuda
        if torch.cuda.is_available():
            facts["device"] = torch.cuda.get_device_name()
            facts["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
    return facts


def _driver() -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    lines = done.stdout.split("\n")
    return None if done.returncode else lines[0].strip() or None


def _missing_for_launchers() -> list[str]:
    """Triton compiles a launcher in C for every kernel."""
    absent = []
    if not any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang")):
        absent.append("a C compiler")
    if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
        absent.append("Python.h")
    return absent
