# SPDX-License-Identifier: Apache-2.0
"""Times every operation beside a plain copy, in rounds, and reports medians."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numba
import torch

from lynx_connector.bench.kernels.caches import Workload, workload
from lynx_connector.bench.kernels.ops import Op, copy_op, make_ops

ROUNDS = 7
Progress = Callable[[str], None]


def measure(
    codecs: Sequence[str],
    head_dims: Sequence[int],
    dtypes: Sequence[str],
    tokens: int,
    device: str,
    progress: Progress,
) -> dict[str, Any]:
    """The report of `lynx bench kernels`; see `measure_one`. On CPU everything runs on one core.

    Raises CodecError for a head size that a codec cannot code.
    """
    if device == "cpu":
        torch.set_num_threads(1)
        numba.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    copies: list[float] = []
    for dtype in dtypes:
        for head_dim in head_dims:
            load = workload(head_dim, dtype, tokens, device)
            for codec in codecs:
                progress(f"{codec}, {dtype}, head size {head_dim}")
                copy_gb_s, measured = measure_one(codec, load)
                copies.append(copy_gb_s)
                rows += measured
    name = torch.cuda.get_device_name() if device == "cuda" else f"{_processor()}, 1 thread"
    return {"device": name, "copy_gb_s": statistics.median(copies), "rows": rows}


def measure_one(codec: str, load: Workload) -> tuple[float, list[dict[str, Any]]]:
    """GB/s of the copy, and a row for each operation of one codec.

    A rate is bytes of KV in the cache's dtype per second, whatever an operation reads and writes;
    `copy_ratio` relates it to the rate of the copy of the same KV. A round does everything once, so
    that all see the same noise.
    """
    copy = copy_op(load)
    copy.run()
    ops = [copy, *make_ops(codec, load)]
    seconds: list[list[float]] = [[] for _ in ops]
    for _ in range(ROUNDS):
        for op, times in zip(ops, seconds, strict=True):
            times.append(_seconds(op, load.cache.device))
    medians = [statistics.median(times) for times in seconds]
    rates = [load.num_bytes / median / 1e9 for median in medians]
    rows = [
        {
            "op": op.name,
            "codec": op.codec,
            "dtype": load.geometry.dtype,
            "head_dim": load.geometry.head_dim,
            "ns_per_element": median / load.elements * 1e9,
            "gb_s": rate,
            "copy_ratio": rate / rates[0],
        }
        for op, median, rate in zip(ops[1:], medians[1:], rates[1:], strict=True)
    ]
    return rates[0], rows


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _seconds(op: Op, device: torch.device) -> float:
    op.prepare()
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        op.run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    began = time.perf_counter()
    op.run()
    return time.perf_counter() - began
