# SPDX-License-Identifier: Apache-2.0
"""`lynx bench kernels` of the checkout, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from typing import Any

from scripts.gpu_check.checkout import ROOT

_RUN = (
    "import sys; from scripts.gpu_check.checkout import use_checkout; use_checkout(); "
    "from lynx_connector.cli import app; app(sys.argv[1:], prog_name='lynx')"
)


def run_bench(rehearsal: bool, environment: dict[str, str], seconds: float) -> dict[str, Any]:
    """Its report, or an `error`. In a rehearsal a short one, of numba kernels on the CPU."""
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        path = os.path.join(folder, "kernels.json")
        command = [sys.executable, "-c", _RUN, "bench", "kernels", "--json", path]
        if rehearsal:
            command += ["--codec", "bf16", "--head-dim", "64", "--tokens", "128"]
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                timeout=max(seconds, 1),
            )
        except subprocess.TimeoutExpired:
            return {"error": f"did not end within {seconds:.0f} s"}
        if done.returncode:
            return {"error": f"exit status {done.returncode}: {done.stderr.strip()[-500:]}"}
        with open(path) as file:
            return json.load(file)
