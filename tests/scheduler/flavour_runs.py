# SPDX-License-Identifier: Apache-2.0
"""A subprocess for each flavour of vLLM's engine, and what its cases have found."""

import json
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from . import tiny_llama
from .engine import ADAPTERS

ROOT = Path(__file__).parents[2]


class FlavourRuns:
    """Runs the flavours, two at a time, each with the cases that this session selected.

    Begun by `begin`, or when a first result is asked for.
    """

    def __init__(self, folder: Path, selected: dict[str, list[str]]) -> None:
        self._folder = folder
        self._selected = selected
        self._pool = ThreadPoolExecutor(2)
        self._runs: dict[str, Future[tuple[dict[str, Any], str]]] = {}
        self._processes: list[subprocess.Popen[str]] = []

    def begin(self, idle: bool = False) -> None:
        """Start them, unless they are; `idle`: only on what other processes leave of the cores."""
        if self._runs:
            return
        model = tiny_llama.write(self._folder / "tiny-llama")
        for seed, adapter in enumerate(ADAPTERS):
            tiny_llama.write_adapter(self._folder / adapter, seed)
        # The slow flavours (Triton's interpreter) together.
        self._runs = {
            flavour: self._pool.submit(self._run, flavour, model, idle)
            for flavour in self._selected
        }

    def get(self, flavour: str, case: str) -> dict[str, Any]:
        """What the case has found, when its flavour is through."""
        self.begin()
        found, log = self._runs[flavour].result()
        return found.get(case, {"ok": False, "detail": f"engine died:\n{log[-4000:]}"})

    def close(self) -> None:
        """End what still runs: nobody will ask for it."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.kill()
        self._pool.shutdown()

    def _run(self, flavour: str, model: Path, idle: bool) -> tuple[dict[str, Any], str]:
        """The flavour's results, and what it printed."""
        path = self._folder / f"{flavour}.json"
        command = [*(("chrt", "--idle", "0") if idle else ()), sys.executable, "-m", __package__]
        process = subprocess.Popen(
            [*command, flavour, str(model), str(path), *self._selected[flavour]],
            cwd=ROOT,
            env=os.environ | {"VLLM_LOGGING_LEVEL": "WARNING"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._processes.append(process)
        try:
            log, _ = process.communicate(timeout=3600 if idle else 1200)
        except subprocess.TimeoutExpired:
            process.kill()
            log, _ = process.communicate()
        return json.loads(path.read_text()) if path.exists() else {}, log
