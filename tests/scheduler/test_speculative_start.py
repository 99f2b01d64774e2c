# SPDX-License-Identifier: Apache-2.0
"""Runs the cases of `cases/` on every flavour of vLLM's engine.

One subprocess per flavour (see `__main__.py`) runs all its cases and writes their results,
which become one test each. `-k v1-sync` and the like narrow the run down to a flavour.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from . import tiny_llama
from .cases import CASES
from .engine import ADAPTERS, FLAVOURS, VARIANTS

ROOT = Path(__file__).parents[2]
STARTED_AS = [*FLAVOURS, *(f"{flavour}+{variant}" for flavour in FLAVOURS for variant in VARIANTS)]
PARAMETERS = [
    pytest.param(flavour, name, id=f"{flavour}-{name}")
    for flavour in STARTED_AS
    for name, case in CASES.items()
    if case.runs_on(flavour)
]


class Results:
    """Runs a subprocess for each flavour, two at a time, with the cases that this session selected.

    Begun when a flavour's first result is asked for.
    """

    def __init__(self, folder: Path, selected: dict[str, list[str]]) -> None:
        self._folder = folder
        self._selected = selected
        self._model = tiny_llama.write(folder / "tiny-llama")
        for seed, adapter in enumerate(ADAPTERS):
            tiny_llama.write_adapter(folder / adapter, seed)
        self._pool = ThreadPoolExecutor(2)
        self._runs: dict[str, Future[tuple[dict[str, Any], str]]] = {}

    def get(self, flavour: str, case: str) -> dict[str, Any]:
        if not self._runs:
            # The slow flavours (Triton's interpreter) together.
            self._runs = {name: self._pool.submit(self._run, name) for name in self._selected}
        found, log = self._runs[flavour].result()
        return found.get(case, {"ok": False, "detail": f"engine died:\n{log[-4000:]}"})

    def close(self) -> None:
        """Wait for what was begun."""
        self._pool.shutdown(cancel_futures=True)

    def _run(self, flavour: str) -> tuple[dict[str, Any], str]:
        """The flavour's results, and what it printed."""
        path = self._folder / f"{flavour}.json"
        command = [sys.executable, "-m", __package__, flavour, self._model, path]
        done = subprocess.run(
            [*map(str, command), *self._selected[flavour]],
            cwd=ROOT,
            env=os.environ | {"VLLM_LOGGING_LEVEL": "WARNING"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=1200,
            check=False,
        )
        return json.loads(path.read_text()) if path.exists() else {}, done.stdout


@pytest.fixture(scope="session")
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Results]:
    selected: dict[str, list[str]] = {}
    for item in request.session.items:
        if getattr(item, "originalname", "") == "test_case":
            flavour, case = item.callspec.params["flavour"], item.callspec.params["case"]
            selected.setdefault(flavour, []).append(case)
    found = Results(tmp_path_factory.mktemp("scheduler"), selected)
    yield found
    found.close()


@pytest.mark.timeout(1500)  # the first one waits for its whole flavour
@pytest.mark.parametrize(("flavour", "case"), PARAMETERS)
def test_case(flavour: str, case: str, results: Results) -> None:
    result = results.get(flavour, case)
    assert result["ok"], result["detail"]
