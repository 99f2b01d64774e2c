# SPDX-License-Identifier: Apache-2.0
"""Starts workers and `lynx bench kernels`, prints what they find and writes one JSON."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from scripts.gpu_check.bench import run_bench
from scripts.gpu_check.cases import NAMES, all_cases
from scripts.gpu_check.machine import FOR_BENCH, NEEDED, missing
from scripts.gpu_check.workers import probe, run_cases

BENCH_SECONDS = 150
"""Kept for `lynx bench kernels` at the end."""


def main() -> int:
    """0: everything ran and agrees, or the rehearsal did; 1: something differs, or did not run;
    2: nothing can run here."""
    options = _options()
    ends = time.monotonic() + options.seconds
    absent = missing(NEEDED)
    if absent:
        print(f"gpu-check: {sys.executable} lacks {', '.join(absent)}: nothing can run.")
        print("Name a Python that has them: make gpu-check PYTHON=/path/to/python3")
        return 2
    try:
        facts = probe()
    except RuntimeError as error:
        print(f"gpu-check: {error}")
        return 2
    rehearsal = facts["device"] is None
    print(f"Python {facts['python']}, torch {facts['torch']}, Triton {facts['triton']}")
    if rehearsal:
        print("NO GPU HERE (torch finds no CUDA device): Triton's interpreter runs the kernels on")
        print("the CPU, as a rehearsal of this check. It proves nothing about a GPU.")
        if facts["driver"]:
            print(f"nvidia-smi shows driver {facts['driver']}: is this torch built for CUDA?")
    else:
        print(f"{facts['device']}, sm_{facts['capability']}, driver {facts['driver']}")
    if facts["missing"]:
        print(f"Not here: {', '.join(facts['missing'])}. What needs them is left out.")

    cases = all_cases(rehearsal, tuple(options.kernel or NAMES))
    until = ends - (0 if options.no_bench else BENCH_SECONDS)
    bench: dict[str, Any] = {"skipped": "--no-bench"}
    # A cache of its own: compiling is part of the check. The benchmark finds in it what it needs.
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        environment = os.environ | {"TRITON_CACHE_DIR": folder}
        environment["TRITON_INTERPRET"] = "1" if rehearsal else "0"
        rows, not_run = run_cases(cases, environment, until, _show)
        for case in not_run:
            print(f"  not run, for want of time: {case}")
        absent = missing(FOR_BENCH)
        if absent:
            bench = {"skipped": f"missing: {', '.join(absent)}"}
        elif not options.no_bench:
            bench = run_bench(rehearsal, environment, ends - time.monotonic())
    print(f"lynx bench kernels: {bench.get('skipped') or bench.get('error') or 'done'}")
    passed = not not_run and all(row["ok"] for row in rows) and "error" not in bench
    report = {
        "passed": passed,
        "rehearsal": rehearsal,
        **facts,
        "seconds": round(options.seconds - (ends - time.monotonic()), 1),
        "kernels": rows,
        "not_run": [case._asdict() for case in not_run],
        "bench": bench,
    }
    options.json.write_text(json.dumps(report, indent=2) + "\n")
    failed = sum(not row["ok"] for row in rows)
    print(f"{len(rows)} operations, {failed} failed, {len(not_run)} cases not run: {options.json}")
    return 0 if passed else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu-check", description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("gpu-check.json"))
    parser.add_argument("--seconds", type=float, default=460, help="all in all (default: 460)")
    parser.add_argument("--kernel", action="append", choices=NAMES, help="repeat it for more")
    parser.add_argument("--no-bench", action="store_true", help="without `lynx bench kernels`")
    return parser.parse_args()


def _show(row: dict[str, Any]) -> None:
    what = f"{row['kernel']} {row.get('op', '')}, head size {row['head_dim']}, {row['dtype']}"
    line = f"  {'ok    ' if row['ok'] else 'FAILED'} {what}"
    if row.get("compile_seconds") is not None:
        line += f", compiled in {row['compile_seconds']:.1f} s"
    if row.get("gb_s") is not None:
        line += f", {row['gb_s']:.0f} GB/s, {row['copy_share']:.0%} of a copy"
    print(line + ("" if row["ok"] else f": {row['differs']}"), flush=True)


if __name__ == "__main__":
    sys.exit(main())
