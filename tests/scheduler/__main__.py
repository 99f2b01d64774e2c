# SPDX-License-Identifier: Apache-2.0
"""Runs the cases on one flavour, and writes {case: {"ok", "seconds", "detail"}}.

    python -m tests.scheduler FLAVOUR MODEL_FOLDER RESULTS.json [CASE ...]

A flavour needs a process of its own: environment variables choose the model runner, and vLLM
engines do not share a process well.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from .cases import CASES
from .engine import build, prepare
from .harness import Harness


def main() -> None:
    flavour, model, results_path, *only = sys.argv[1:]
    prepare(flavour)
    started = time.monotonic()
    harness = Harness(build(flavour, model), flavour, Path(model).parent)
    print(f"{flavour}: up in {time.monotonic() - started:.0f} s", flush=True)
    results: dict[str, dict[str, Any]] = {}
    broken = None
    for name, case in CASES.items():
        if (only and name not in only) or not case.runs_on(flavour):
            continue
        started = time.monotonic()
        try:
            if broken:
                raise RuntimeError(f"not run: the engine broke in {broken}")
            case.run(harness)
            harness.settle()
            detail = ""
        except Exception:
            detail = traceback.format_exc()
            broken = broken or _recover(harness, name)
        seconds = time.monotonic() - started
        results[name] = {"ok": not detail, "seconds": round(seconds, 2), "detail": detail}
        print(f"{'FAIL' if detail else 'ok':5}{name} {seconds:.1f} s", flush=True)
        if detail:
            print(detail, flush=True)
    Path(results_path).write_text(json.dumps(results))


def _recover(harness: Harness, name: str) -> str | None:
    """Try to leave a clean engine to the next case; `name` if that fails."""
    try:
        harness.engine.abort_request(list(harness.engine.output_processor.request_states))
        harness.run()
        harness.settle()
    except Exception:
        return name
    return None


if __name__ == "__main__":
    main()
