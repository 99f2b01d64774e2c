# SPDX-License-Identifier: Apache-2.0
"""`make gpu-check`: its rehearsal on a bare machine, and what it says of kernels that fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import torch
import triton
from lynx_kernels.shared.paged import PagedKVCache

from scripts.gpu_check import kernels, loads, workers
from scripts.gpu_check.cases import NAMES, SHAPES, all_cases
from scripts.gpu_check.kernels import KERNELS

ROOT = Path(__file__).parents[3]
GONE = ("numba", "msgspec", "xxhash", "typer", "rich", "pydantic", "vllm", "ucxx")
BARE = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = staticmethod(
    lambda name, *more: None if name.partition(".")[0] in {gone} else find(name, *more)
)
"""
INTERPRETED = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}


def run_without(gone: tuple[str, ...], folder: Path, *arguments: str) -> Any:
    """The check on a machine without these packages and without a GPU."""
    (folder / "sitecustomize.py").write_text(BARE.format(gone=gone))
    return subprocess.run(
        [sys.executable, "-m", "scripts.gpu_check", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(folder), "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        text=True,
        timeout=500,
    )


def test_without_triton_nothing_runs_and_it_is_named(tmp_path: Path) -> None:
    done = run_without(("triton", "numpy"), tmp_path)
    assert done.returncode == 2
    assert "lacks triton, numpy: nothing can run" in done.stdout


def test_rehearsal_on_a_machine_with_torch_and_triton_alone(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    arguments = ("--kernel", "raw", "--kernel", "hadamard", "--json", str(report))
    done = run_without(GONE, tmp_path, *arguments)
    assert done.returncode == 0, done.stdout
    assert "NO GPU HERE" in done.stdout
    found = json.loads(report.read_text())
    assert found["passed"] and found["rehearsal"] and found["device"] is None
    assert found["triton"] == triton.__version__ and found["torch"] == torch.__version__
    assert found["missing"][: len(GONE)] == list(GONE)
    assert found["bench"] == {"skipped": "missing: numba, msgspec, xxhash, typer, rich, pydantic"}
    assert [(row["kernel"], row["op"]) for row in found["kernels"]] == 2 * [
        *(("raw", op) for op in ("encode", "decode")),
        *(("hadamard", op) for op in ("encode", "decode", "patch")),
    ]
    assert all(row["ok"] and "gb_s" not in row for row in found["kernels"])


def test_failing_kernels_are_named_and_stop_no_other(monkeypatch) -> None:
    monkeypatch.setattr(workers.Worker, "module", "tests.unit.gpu_check.broken_worker")
    names = ("hadamard", "int8", "int4", "raw")
    cases = [case._replace(timed=False) for case in all_cases(True, names)[:4]]
    rows, not_run = workers.run_cases(cases, INTERPRETED, time.monotonic() + 400, lambda row: None)
    assert not not_run
    said = {(row["kernel"], row.get("op")): row for row in rows}
    assert said["hadamard", "encode"]["ok"]
    wrong = said["hadamard", "decode"]["differs"]
    slot = loads.Load(loads.Shape(1, 2, 64, 7), "bfloat16", "cpu", odd=False).slots[2]
    assert f"first slot {slot}, layer 0, V, head 0, element 5: " in wrong
    assert said["int8", "encode"]["differs"] == "no such instruction"
    assert "ValueError" in said["int8", "encode"]["details"]
    killed = said["int4", None]
    assert killed["differs"].startswith("the worker ended with status -11")
    assert (killed["head_dim"], killed["dtype"]) == (64, "bfloat16")
    assert said["raw", "encode"]["ok"] and said["raw", "decode"]["ok"]


def test_what_there_is_no_time_for_is_listed() -> None:
    cases = all_cases(True)
    rows, not_run = workers.run_cases(cases, INTERPRETED, time.monotonic(), lambda row: None)
    assert (rows, not_run) == ([], cases)


def test_every_kernel_that_is_launched_is_checked() -> None:
    """A Triton kernel file that this check does not know would go unproven."""
    there = {path.parent.name for path in (ROOT / "kernels").glob("*/gpu.py")}
    used = {name.removesuffix("_gpu") for name in vars(kernels) if name.endswith("_gpu")}
    assert used == there
    assert tuple(KERNELS) == NAMES


def test_codes_of_klt_hold_in_every_shape_that_is_checked() -> None:
    for head_dim, _ in SHAPES:
        code = kernels.klt_code(1, 1, head_dim)
        assert (code.anchor.sum(-1) == 4 * head_dim).all()
        assert code.total.sum(-1).flatten().tolist() == [7.5 * head_dim, 8.5 * head_dim]
        assert (code.lower >= 0).all() and abs(code.basis).max() < 1024


def test_a_difference_is_told_by_its_place() -> None:
    rows = torch.zeros((3, 10), dtype=torch.uint8)
    other = rows.clone()
    other[1, 4] = 7
    assert not loads.differing_rows(rows, rows)
    assert loads.differing_rows(rows, other) == (
        "3.33% of the bytes; first token 1, byte 4: 0 instead of 7"
    )
    assert not loads.differing_rows(rows, other, tolerated=0.04)
    cache: PagedKVCache = loads.Load(loads.Shape(2, 3, 8, 7), "float32", "cpu", odd=True).cache
    values = loads.everything(cache)
    assert values.isnan().any() and not loads.differing_values(values, values.clone())
    changed = values.clone()
    changed[4, 1, 0, 2, 7] = -0.0
    changed[3, 1, 0, 2, 7] = 0.0
    values[3:5, 1, 0, 2, 7] = 0.0
    assert "first slot 4, layer 1, K, head 2, element 7: 0.0 instead of -0.0" in (
        loads.differing_values(values, changed)
    )
