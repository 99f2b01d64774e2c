# SPDX-License-Identifier: Apache-2.0
"""The process that has the device: `python -m scripts.gpu_check.worker CASES_AS_JSON`.

Prints a line of JSON for the machine, before every case and for every operation: `machine`,
`case` or `row`. Exit status 3: the device is lost to this process.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from scripts.gpu_check.cases import Case
from scripts.gpu_check.checkout import use_checkout
from scripts.gpu_check.machine import describe

if TYPE_CHECKING:
    from scripts.gpu_check.kernels import Op
    from scripts.gpu_check.loads import Load

DEVICE_LOST = 3
ROUNDS = 7


def main(cases: list[Case]) -> int:
    use_checkout()
    say(machine=describe())
    for number, case in enumerate(cases):
        say(case=number)
        try:
            run(case)
        except Exception as error:
            say(row=failure(str(error) or type(error).__name__, traceback.format_exc()))
            if "CUDA error" in str(error):
                return DEVICE_LOST
    return 0


def say(**line: Any) -> None:
    print(json.dumps(line), flush=True)


def failure(differs: str, details: str = "") -> dict[str, Any]:
    """What a row says of an operation that failed."""
    lines = differs.strip().splitlines() or [""]
    return {"ok": False, "differs": lines[0], "details": details[-2000:]}


def run(case: Case) -> None:
    """Says a row for each operation of a case; one that fails does not keep the others from
    running."""
    import torch

    from scripts.gpu_check.kernels import KERNELS
    from scripts.gpu_check.loads import Load, Shape

    rehearsal = os.environ.get("TRITON_INTERPRET") == "1"
    device = "cpu" if rehearsal else "cuda"
    if rehearsal:
        torch.set_num_threads(1)
    shape = Shape(case.layers, case.heads, case.head_dim, case.tokens)
    load = Load(shape, case.dtype, device, odd=True)
    rows = [check(op, load) for op in KERNELS[case.kernel](load).ops()]
    try:
        if case.timed and all(row["ok"] for row in rows):
            add_rates(case, rows, shape if rehearsal else None)
    finally:
        for row in rows:
            say(row=row)


def check(op: Op, load: Load) -> dict[str, Any]:
    row: dict[str, Any] = {"op": op.name, "compile_seconds": None}
    try:
        first, second = (seconds(op.run, load.device) for _ in range(2))
        differs = op.differs()
    except Exception as error:
        if "CUDA error" in str(error):
            raise
        return row | failure(str(error) or type(error).__name__, traceback.format_exc())
    if load.device.type == "cuda":
        row["compile_seconds"] = round(max(0.0, first - second), 3)
    return row | {"ok": not differs, "differs": differs}


def add_rates(case: Case, rows: list[dict[str, Any]], shape: Any) -> None:
    """GB/s of KV in the cache's dtype, and its share of a plain copy of the same KV, medians of
    rounds that do everything once. A rehearsal (its shape is given) goes the same way and keeps no
    rate: an interpreter's says nothing."""
    import torch

    from scripts.gpu_check.kernels import KERNELS
    from scripts.gpu_check.loads import Load, Shape

    device = "cpu" if shape else "cuda"
    # A card with little memory takes a shorter prompt; the exact tier needs several copies of it.
    for tokens in (8192, 2048, 512) if case.kernel != "exact" else (2048, 512):
        large = shape or Shape(16, 8, case.head_dim, tokens)
        try:
            load = Load(large, case.dtype, device, odd=False)
            ops = KERNELS[case.kernel](load).ops()
            source = torch.ones(load.num_bytes, dtype=torch.uint8, device=load.device)
            target = torch.zeros_like(source)
            runs: list[Callable[[], object]] = [
                partial(target.copy_, source),
                *(op.run for op in ops),
            ]
            times: list[list[float]] = [[] for _ in runs]
            for count in range(1 + (1 if shape else ROUNDS)):
                for operation, taken in zip(runs, times, strict=True):
                    spent = seconds(operation, load.device)
                    if count:  # the first one warms up
                        taken.append(spent)
            break
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
    else:
        for row in rows:
            row["not_timed"] = "out of memory"
        return
    copy, *medians = (statistics.median(taken) for taken in times)
    for row, median in zip(rows, medians, strict=True):
        row["timed_tokens"] = large.tokens
        if shape is None:
            row["gb_s"] = round(load.num_bytes / median / 1e9, 2)
            row["copy_gb_s"] = round(load.num_bytes / copy / 1e9, 2)
            row["copy_share"] = round(copy / median, 4)


def seconds(run: Callable[[], object], device: Any) -> float:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main([Case(*fields) for fields in json.loads(sys.argv[1])]))
