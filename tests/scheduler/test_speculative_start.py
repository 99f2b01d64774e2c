# SPDX-License-Identifier: Apache-2.0
"""Runs the case list of scheduler_cases.py on every flavour of vLLM's engine.

One subprocess per flavour (see scheduler_harness.py) runs all its cases and writes their results,
which become one test each. `-k v1-sync` and the like narrow the run down to a flavour.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import early_reply_cases  # noqa: E402, F401
import first_token_cases  # noqa: E402, F401  registers its cases
import tiny_llama  # noqa: E402
from scheduler_cases import CASES  # noqa: E402
from scheduler_harness import FLAVOURS  # noqa: E402

PARAMETERS = [
    pytest.param(flavour, name, id=f"{flavour}-{name}")
    for flavour in FLAVOURS
    for name, case in CASES.items()
    if case.runs_on(flavour)
]


class Results:
    """Lazily runs a flavour's subprocess with the cases that this session selected."""

    def __init__(self, folder: Path, selected: dict[str, list[str]]) -> None:
        self._folder = folder
        self._selected = selected
        self._model = tiny_llama.write(folder / "tiny-llama")
        self._results: dict[str, dict[str, Any]] = {}
        self._logs: dict[str, str] = {}

    def get(self, flavour: str, case: str) -> dict[str, Any]:
        if flavour not in self._results:
            self._run(flavour)
        log = self._logs[flavour][-4000:]
        return self._results[flavour].get(case, {"ok": False, "detail": f"engine died:\n{log}"})

    def _run(self, flavour: str) -> None:
        path = self._folder / f"{flavour}.json"
        command = [sys.executable, HERE / "scheduler_harness.py", flavour, self._model, path]
        done = subprocess.run(
            [*map(str, command), *self._selected[flavour]],
            env=os.environ | {"VLLM_LOGGING_LEVEL": "WARNING"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=540,
            check=False,
        )
        self._logs[flavour] = done.stdout
        self._results[flavour] = json.loads(path.read_text()) if path.exists() else {}


@pytest.fixture(scope="session")
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Results]:
    selected: dict[str, list[str]] = {}
    for item in request.session.items:
        if getattr(item, "originalname", "") == "test_case":
            flavour, case = item.callspec.params["flavour"], item.callspec.params["case"]
            selected.setdefault(flavour, []).append(case)
    yield Results(tmp_path_factory.mktemp("scheduler"), selected)


@pytest.mark.parametrize(("flavour", "case"), PARAMETERS)
def test_case(flavour: str, case: str, results: Results) -> None:
    result = results.get(flavour, case)
    assert result["ok"], result["detail"]
