# SPDX-License-Identifier: Apache-2.0
"""Hadamard codec, torch reference: one vector (token, layer, K or V, head) at a time.

encode: Walsh-Hadamard transform -> scale -> 256-level code; the upper nibble of the code is the
anchor, the lower one the residual (`anchor_code`). decode undoes it from the anchor alone or from
both. Read the numba twin in `cpu.py` side by side with this file.

Scale: one byte s per vector. Its value is 2^((s - 126) / 8), s = 1..254, that is 2^-15.625 to
2^16 in steps of 1/8 octave, rounded up from the absolute maximum of the orthonormal coefficients,
so that nothing clips. s = 0 stands for a zero vector (also for maxima below 2^-18), s = 255 for a
vector that holds NaN or infinity or whose transform overflows float32: it decodes to NaN
throughout and touches no other vector. Finite maxima beyond 2^16 saturate.

Bit exactness: the transform consists of float32 additions in a fixed order, the rest of single
multiplications and table lookups; there is no sum that a compiler could reorder and no
multiply-add that it may contract into one rounding, except `q + GRID` in the quantiser, which
must stay two operations.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from lynx_kernels.shared.anchor_code import GRID, AnchorCode, anchor_code
from lynx_kernels.shared.error_steps import NO_ERROR, error_steps
from numpy.typing import NDArray

MIN_TRANSFORM = 8
STEPS_PER_OCTAVE = 8
SCALE_BIAS = 126
SCALE_ZERO, SCALE_MIN, SCALE_MAX, SCALE_NONFINITE = 0, 1, 254, 255
TINY_BITS = (127 - 18) << 23  # float32 bits of 2^-18: smaller maxima count as zero
INFINITY_BITS = 0x7F800000
# Mantissa bits of 2^(j/8): a maximum needs one more step for each of these that it exceeds.
STEP_MANTISSAS = (
    np.exp2(np.arange(STEPS_PER_OCTAVE) / STEPS_PER_OCTAVE).astype(np.float32).view(np.int32)
    & 0x7FFFFF
)


@dataclass(frozen=True)
class HadamardTables:
    """Constants of one head_dim, shared by both implementations.

    transform: length of the transform; the vector is cut into head_dim / transform pieces
    norm: float32 1 / sqrt(transform), which makes the transform orthonormal
    to_grid: float32 [256], raw coefficient * to_grid[s] = grid points from the middle
    to_raw: float32 [256], u * to_raw[s] = raw coefficient before the inverse transform's sums
    code: the quantiser
    """

    transform: int
    norm: np.float32
    to_grid: NDArray[np.float32]
    to_raw: NDArray[np.float32]
    code: AnchorCode


def transform_length(head_dim: int) -> int:
    """Largest power of two that divides head_dim (64 -> 64, 96 -> 32, 80 -> 16)."""
    return head_dim & -head_dim


@functools.cache
def hadamard_tables(head_dim: int) -> HadamardTables:
    """Raises ValueError unless head_dim is a multiple of 8."""
    transform = transform_length(head_dim)
    if head_dim < MIN_TRANSFORM or transform < MIN_TRANSFORM:
        raise ValueError(f"head_dim {head_dim} is not a multiple of {MIN_TRANSFORM}")
    scale = np.exp2((np.arange(256) - SCALE_BIAS) / STEPS_PER_OCTAVE)
    to_grid = (GRID / (math.sqrt(transform) * scale)).astype(np.float32)
    to_raw = (scale / math.sqrt(transform)).astype(np.float32)
    to_grid[[SCALE_ZERO, SCALE_NONFINITE]] = 0
    to_raw[SCALE_ZERO] = 0
    to_raw[SCALE_NONFINITE] = np.nan
    to_grid.setflags(write=False)
    to_raw.setflags(write=False)
    norm = np.float32(1 / math.sqrt(transform))
    return HadamardTables(transform, norm, to_grid, to_raw, anchor_code(head_dim))


def error_spread(head_dim: int) -> NDArray[np.int16]:
    """Expected error of an element by scale byte, int16 [256], in 1/8 octaves."""
    spread = np.arange(256, dtype=np.int16) - np.int16(SCALE_BIAS)
    spread += error_steps(np.array(anchor_code(head_dim).refined_variance))
    spread[SCALE_ZERO] = NO_ERROR
    return spread


def walsh_hadamard(x: torch.Tensor, length: int) -> torch.Tensor:
    """Unnormalised transform of each run of `length` along the last axis, in float32.

    Butterflies of distance 1, 2, 4, ...: the order that the numba twin follows.
    """
    shape = x.shape
    y = x.float()
    distance = 1
    while distance < length:
        y = y.reshape(*shape[:-1], -1, 2, distance)
        low, high = y[..., 0, :], y[..., 1, :]
        y = torch.stack((low + high, low - high), dim=-2)
        distance *= 2
    return y.reshape(shape)


def encode(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Vectors [..., D] of any float dtype -> anchor [..., D/2], scale [...], residual [..., D/2].

    All uint8; the low nibble holds the even element.
    """
    tables = hadamard_tables(x.shape[-1])
    y = walsh_hadamard(x, tables.transform)
    scale = scale_codes(y, tables)
    to_grid = _on(tables.to_grid, x.device)[scale.long()]
    position = y * to_grid.unsqueeze(-1) + GRID
    # NaN (from a vector whose scale says so) becomes a grid point too: any will do.
    position = torch.nan_to_num(position, nan=0.0).clamp_(0, 2 * GRID)
    code = _on(tables.code.code_of_grid, x.device)[position.long()]
    even, odd = code[..., 0::2], code[..., 1::2]
    return (even >> 4) | (odd & 0xF0), scale, (even & 0x0F) | ((odd & 0x0F) << 4)


def decode(
    anchor: torch.Tensor, scale: torch.Tensor, residual: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Inverse of `encode`, from the anchor alone where residual is None: [..., D] in `dtype`."""
    head_dim = 2 * anchor.shape[-1]
    tables = hadamard_tables(head_dim)
    if residual is None:
        level = _on(tables.code.anchor_level, anchor.device)
        even, odd = anchor & 0x0F, anchor >> 4
    else:
        level = _on(tables.code.refined_level, anchor.device)
        even = ((anchor & 0x0F) << 4) | (residual & 0x0F)
        odd = (anchor & 0xF0) | (residual >> 4)
    codes = torch.stack((even, odd), dim=-1).flatten(-2)
    to_raw = _on(tables.to_raw, anchor.device)[scale.long()]
    y = walsh_hadamard(level[codes.long()] * to_raw.unsqueeze(-1), tables.transform)
    limit = torch.finfo(dtype).max  # a 16-bit overflow must not turn into infinity
    return y.clamp(-limit, limit).to(dtype)


def scale_codes(y: torch.Tensor, tables: HadamardTables) -> torch.Tensor:
    """Scale bytes [...] of raw coefficients [..., D], by integer arithmetic on float32 bits."""
    # Compared as integers, magnitudes keep their order, and NaN > infinity > every number.
    maximum = (y.view(torch.int32) & 0x7FFFFFFF).amax(dim=-1)
    finite = maximum < INFINITY_BITS
    bits = (maximum.view(torch.float32) * float(tables.norm)).view(torch.int32)
    octave = (bits >> 23) - 127
    mantissa = bits & 0x7FFFFF
    steps = (mantissa.unsqueeze(-1) > _on(STEP_MANTISSAS, y.device)).sum(dim=-1)
    code = (octave * STEPS_PER_OCTAVE + steps + SCALE_BIAS).clamp(SCALE_MIN, SCALE_MAX)
    code = torch.where(bits < TINY_BITS, SCALE_ZERO, code)
    return torch.where(finite, code, SCALE_NONFINITE).to(torch.uint8)


def _on(table: NDArray[np.generic], device: torch.device) -> torch.Tensor:
    return torch.tensor(table, device=device)
