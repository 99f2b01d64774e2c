# SPDX-License-Identifier: Apache-2.0
"""What is checked, the most telling first: time may run out."""

from __future__ import annotations

from typing import Any, NamedTuple

NAMES = ("raw", "int8", "int4", "hadamard", "exact", "klt")
BFLOAT16, FLOAT16, FLOAT32 = "bfloat16", "float16", "float32"
SHAPES = (
    (128, BFLOAT16), (64, BFLOAT16), (128, FLOAT16), (64, FLOAT32), (80, BFLOAT16),
    (96, FLOAT16), (256, BFLOAT16), (192, FLOAT32),
)  # fmt: skip
REHEARSED = ((64, BFLOAT16), (80, FLOAT16))
"""The interpreter takes milliseconds an instruction."""


class Case(NamedTuple):
    """One kernel with caches of one kind, of the shape that is compared with the reference."""

    kernel: str
    head_dim: int
    dtype: str
    layers: int
    heads: int
    tokens: int
    timed: bool
    """Too, where it agrees, with a load of the size that `lynx bench kernels` takes."""

    def as_row(self) -> dict[str, Any]:
        """How a report names it."""
        return {name: value for name, value in self._asdict().items() if name != "timed"}

    def __str__(self) -> str:
        return f"{self.kernel}, head size {self.head_dim}, {self.dtype}"


def all_cases(rehearsal: bool, kernels: tuple[str, ...] = NAMES) -> list[Case]:
    """A shape after the other, all kernels with it; klt, slow to interpret, is rehearsed once."""
    shapes = REHEARSED if rehearsal else SHAPES
    layers, heads, tokens = (1, 2, 7) if rehearsal else (2, 8, 70)
    return [
        Case(kernel, head_dim, dtype, layers, heads, tokens, timed=number < 2)
        for number, (head_dim, dtype) in enumerate(shapes)
        for kernel in kernels
        if not (rehearsal and number and kernel == "klt")
    ]
