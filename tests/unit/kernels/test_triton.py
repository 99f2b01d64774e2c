# SPDX-License-Identifier: Apache-2.0
"""Triton kernels: equal to the torch reference, interpreted and on CUDA; fit to be compiled.

The cases are in `triton_cases.py` and `triton_exact_cases.py`; the interpreter needs a process of
its own.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton
from lynx_kernels.exact import gpu as exact_gpu
from lynx_kernels.exact.code import lanes_of
from lynx_kernels.shared import tiles_gpu as tiles_gpu
from lynx_kernels.shared.tiles_cpu import KIND
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.unit.conftest import build_cache
from tests.unit.kernels.triton_cases import CASES, codec_of
from tests.unit.kernels.triton_exact_cases import EXACT_CASES

ROOT = Path(__file__).parents[3]
MODULES = {
    "klt": "klt.gpu",
    "hadamard": "hadamard.gpu",
    "bf16": "raw.gpu",
    "int8": "uniform.gpu",
    "int4": "uniform.gpu",
}
ALL_CASES = CASES | EXACT_CASES
HOPPER = GPUTarget("cuda", 90, 32)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    """What each case found, from two processes at once."""

    def run(cases: list[str]) -> dict[str, str]:
        done = subprocess.run(
            [sys.executable, "-m", "tests.unit.kernels.run_triton_cases", *cases],
            cwd=ROOT,
            env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
            timeout=540,
            check=True,
        )
        return json.loads(done.stdout.splitlines()[-1])

    names = list(ALL_CASES)
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(run, (names[::2], names[1::2]))
    return one | two


@pytest.mark.parametrize("case", ALL_CASES)
def test_interpreted_kernels_equal_the_reference(interpreted, case: str) -> None:
    assert not interpreted[case], interpreted[case]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", ALL_CASES)
def test_kernels_on_cuda_equal_the_reference(case: str) -> None:
    check, codec, dtype = ALL_CASES[case]
    check(codec, dtype, "cuda")


class _Launch:
    """Stands in for a kernel and keeps the arguments of its launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.launches: list[dict[str, Any]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda **arguments: self.launches.append(arguments)


def _compile(kernel: Any, arguments: dict[str, Any]) -> Any:
    """The kernel for Hopper, which needs no GPU, specialised as a launch would."""
    types = {torch.uint8: "*u8", torch.uint16: "*u16", torch.uint32: "*u32", torch.int16: "*i16"}
    types |= {torch.int64: "*i64", torch.float32: "*fp32", torch.int32: "*i32"}
    signature, constants, attributes = {}, {}, {}
    for number, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = types[value.dtype]
            attributes[(number,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
    source = ASTSource(kernel, signature, constants, attributes)
    options = {name: value for name, value in arguments.items() if name in tiles_gpu.OPTIONS}
    return triton.compile(source, target=HOPPER, options=options)


@pytest.mark.skipif("nvidia" not in backends, reason="Triton was built without its NVIDIA backend")
@pytest.mark.parametrize(
    ("name", "module", "head_dim", "layout", "dtype"),
    [
        (name, module, *shape)
        for name, module in MODULES.items()
        for shape in (
            (128, "flash", "bfloat16"),
            (80, "cpu_vec", "float16"),
            (96, "flash", "float32"),
        )
        if name != "klt" or shape[0] == 128  # klt takes a quarter of a minute
    ],
)
def test_compiled_kernels_round_as_the_reference_does(
    monkeypatch, name: str, module: str, head_dim: int, layout: str, dtype: str
) -> None:
    """No fused multiply-add, no flushed denormals, no approximate division.

    klt's matrix product may fuse when encoding; when decoding its sums are exact.
    """
    kernels = importlib.import_module(f"lynx_kernels.{module}")
    found = {
        key: value
        for key, value in vars(kernels).items()
        if isinstance(value, triton.JITFunction)
        and key.lstrip("_").startswith(("encode", "decode", "copy"))
    }
    launches = {key: _Launch(kernel) for key, kernel in found.items()}
    for key, launch in launches.items():
        monkeypatch.setattr(kernels, key, launch)
    cache = build_cache(layout, head_dim=head_dim, dtype=getattr(torch, dtype))
    codec = codec_of(name, cache)
    slots = torch.arange(8)
    rows = [torch.zeros((8, codec.bytes_per_token(t)), dtype=torch.uint8) for t in codec.tiers]
    codec.encode_device(cache, slots, dict(zip(codec.tiers, rows, strict=True)))
    for count in range(1, len(rows) + 1):
        codec.decode_device(rows[:count], cache, slots)
    compiled = [
        (key, _compile(launch.kernel, arguments).asm["ptx"])
        for key, launch in launches.items()
        for arguments in launch.launches
    ]
    assert len(compiled) == (1 + len(rows)) * (2 if name == "klt" else 1)  # K and V apart
    for key, code in compiled:
        assert key == "encode_k" or "fma.rn.f32" not in code
        assert not re.search(r"\.ftz|div\.(full|approx)", code)


@pytest.mark.skipif("nvidia" not in backends, reason="Triton was built without its NVIDIA backend")
@pytest.mark.parametrize(
    ("dtype", "vectors", "head_dim", "lanes"),
    [("bfloat16", 1024, 64, 32), ("float16", 2, 80, 1), ("float32", 180, 64, 8)],
)
def test_compiled_exact_coder_is_integer_arithmetic_in_registers(
    monkeypatch, dtype: str, vectors: int, head_dim: int, lanes: int
) -> None:
    """No float: nothing is rounded otherwise. Lanes of a warp: nothing waits for shared memory."""
    kernels = ("_encode", "_pack", "_decode")
    launches = {name: _Launch(getattr(exact_gpu, name)) for name in kernels}
    for name, launch in launches.items():
        monkeypatch.setattr(exact_gpu, name, launch)
    kind, word = KIND[getattr(torch, dtype)], torch.uint32 if dtype == "float32" else torch.uint16
    values = torch.zeros((8, vectors * head_dim), dtype=word)
    spread = torch.zeros((8, vectors), dtype=torch.int16)
    tilt = torch.zeros((vectors, head_dim), dtype=torch.int16)
    assert lanes_of(vectors * head_dim) == lanes
    exact_gpu.encode(values, values, spread, tilt, kind, 8)
    lengths = np.full(8, 8 + 4 * lanes, np.uint32)
    data = torch.zeros(int(lengths.sum()), dtype=torch.uint8)
    with pytest.raises(ValueError, match="last element"):  # nothing was decoded
        exact_gpu.decode(data, lengths, values, spread, tilt, kind, 8)
    for launch in launches.values():
        (arguments,) = launch.launches
        code = _compile(launch.kernel, arguments)
        assert not re.search(r"\.(b?f16|f32|f64)\b|bar\.sync|\.local", code.asm["ptx"])
        assert code.metadata.shared == 0
