# SPDX-License-Identifier: Apache-2.0
"""Hadamard codec, Triton: fused page -> tier rows and tier rows -> page, all layers a launch.

Same operations in the same order as `reference.py`, which explains them; results are equal bit
for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from lynx_kernels.hadamard import reference as hadamard
from lynx_kernels.hadamard.reference import hadamard_tables
from lynx_kernels.shared.anchor_code import GRID
from lynx_kernels.shared.paged import PagedKVCache
from lynx_kernels.shared.tiles_gpu import (
    INFINITY,
    MAGNITUDE,
    OPTIONS,
    device_table,
    element_pointers,
    from_single,
    grid,
    locate,
    page_arguments,
    row_pointers,
    to_single,
    vector_mask,
)

_BIAS = tl.constexpr(hadamard.SCALE_BIAS)
_STEPS = tl.constexpr(hadamard.STEPS_PER_OCTAVE)
_STEP_MANTISSAS = tl.constexpr(tuple(int(mantissa) for mantissa in hadamard.STEP_MANTISSAS))
_TINY = tl.constexpr(hadamard.TINY_BITS)
_ZERO, _MIN, _MAX, _NONFINITE = (
    tl.constexpr(code)
    for code in (
        hadamard.SCALE_ZERO,
        hadamard.SCALE_MIN,
        hadamard.SCALE_MAX,
        hadamard.SCALE_NONFINITE,
    )
)
_CENTRE = tl.constexpr(float(GRID))
_LAST = tl.constexpr(float(2 * GRID))


def encode(
    cache: PagedKVCache, slots: torch.Tensor, anchor: torch.Tensor, residual: torch.Tensor
) -> None:
    """Encode K and V of every layer at `slots` into tier rows on the cache's device.

    slots: int64 [T], inside the cache; anchor: uint8 [T, L*2*H*(D/2 + 1)], codes [L, 2, H, D/2] and
    then scales [L, 2, H]; residual: uint8 [T, L*2*H*D/2]. Rows C-contiguous.
    """
    tables = hadamard_tables(cache.head_dim)
    _encode[grid(cache, len(slots))](
        **page_arguments(cache, slots),
        to_grid=device_table(tables.to_grid, cache.device),
        code_of_grid=device_table(tables.code.code_of_grid, cache.device),
        norm=float(tables.norm),
        anchor=anchor,
        anchor_pitch=anchor.stride(0),
        residual=residual,
        residual_pitch=residual.stride(0),
        STAGES=tables.transform.bit_length() - 1,
        **OPTIONS,
    )


def decode(
    cache: PagedKVCache, slots: torch.Tensor, anchor: torch.Tensor, residual: torch.Tensor | None
) -> None:
    """Write K and V of every layer at `slots` from the anchor, refined by the residual if given.

    Arguments as in `encode`; slots must not repeat.
    """
    tables = hadamard_tables(cache.head_dim)
    code = tables.code
    refined = residual is not None
    residual = residual if residual is not None else anchor
    _decode[grid(cache, len(slots))](
        **page_arguments(cache, slots),
        to_raw=device_table(tables.to_raw, cache.device),
        level=device_table(code.refined_level if refined else code.anchor_level, cache.device),
        anchor=anchor,
        anchor_pitch=anchor.stride(0),
        residual=residual,
        residual_pitch=residual.stride(0),
        STAGES=tables.transform.bit_length() - 1,
        REFINED=refined,
        **OPTIONS,
    )


@triton.jit
def walsh_hadamard(y, STAGES: tl.constexpr):
    """Unnormalised transform of each run of 2^STAGES elements along the last axis of [ROWS, DIM].

    Butterflies of distance 1, 2, 4, ...: the order that the reference follows.
    """
    for stage in tl.static_range(STAGES):
        pairs = tl.reshape(y, (y.numel >> (stage + 1), 2, 1 << stage))
        y = tl.reshape(_butterflies(pairs), y.shape)
    return y


@triton.jit
def _butterflies(own):
    """Sums and differences along the middle axis, of length 2.

    Each element meets its partner through the sum of their bits as integers (exact, modulo 2^32):
    in one thread's registers that folds away, between threads it is one shuffle; no shared memory.
    """
    bits = own.to(tl.int32, bitcast=True)
    partner = (tl.sum(bits, 1, keep_dims=True) - bits).to(tl.float32, bitcast=True)
    is_high = (tl.arange(0, 2) == 1)[None, :, None]
    return tl.where(is_high, partner - own, own + partner)


@triton.jit
def scale_codes(y, norm):
    """Scale codes int32 [ROWS] of raw coefficients [ROWS, DIM]."""
    largest = tl.max(y.to(tl.int32, bitcast=True) & MAGNITUDE, axis=1)
    bits = (largest.to(tl.float32, bitcast=True) * norm).to(tl.int32, bitcast=True)
    mantissa = bits & 0x7FFFFF
    code = ((bits >> 23) - 127) * _STEPS + _BIAS
    for step in tl.static_range(_STEPS):
        code += (mantissa > _STEP_MANTISSAS[step]).to(tl.int32)
    code = tl.minimum(tl.maximum(code, _MIN), _MAX)
    code = tl.where(bits < _TINY, _ZERO, code)
    return tl.where(largest < INFINITY, code, _NONFINITE)


@triton.jit
def grid_codes(y, factor, code_of_grid):
    """256-level codes uint8 [ROWS, DIM] of raw coefficients; factor: [ROWS]."""
    position = y * factor[:, None] + _CENTRE
    position = tl.where(position > 0.0, position, 0.0)  # NaN too
    position = tl.where(position < _LAST, position, _LAST)
    return tl.load(code_of_grid + position.to(tl.int32))


@triton.jit
def _scale_pointers(anchor, pitch, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr):
    """Pointers [ROWS] to the scale bytes behind all codes of a row."""
    token, vector = locate(HEADS, ROWS)
    first = token.to(tl.int64) * pitch + tl.num_programs(1) * (HEADS * HEAD_DIM)
    return anchor + first + (tl.program_id(1) * (2 * HEADS) + vector)


@triton.jit(do_not_specialize=["num_tokens"])
def _encode(
    layers,
    slots,
    index,
    num_tokens,
    stride_block,
    stride_head,
    stride_token,
    to_grid,
    code_of_grid,
    norm,
    anchor,
    anchor_pitch,
    residual,
    residual_pitch,
    STAGES: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KIND: tl.constexpr,
    IN_ROWS: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
):
    elements, mask = element_pointers(
        layers, slots, index, num_tokens, stride_block, stride_head, stride_token,
        HEADS, HEAD_DIM, DIM, BLOCK_SIZE, KIND, IN_ROWS, ALIGNED, ROWS,
    )  # fmt: skip
    y = walsh_hadamard(to_single(tl.load(elements, mask=mask, other=0), KIND), STAGES)
    scale = scale_codes(y, norm)
    code = grid_codes(y, tl.load(to_grid + scale), code_of_grid)
    even, odd = tl.split(tl.reshape(code, (ROWS, DIM // 2, 2)))

    token, _ = locate(HEADS, ROWS)
    there = vector_mask(num_tokens, HEAD_DIM // 2, DIM // 2, HEADS, ROWS)
    place = row_pointers(anchor, anchor_pitch, HEAD_DIM // 2, DIM // 2, HEADS, ROWS)
    tl.store(place, (even >> 4) | (odd & 0xF0), mask=there)
    place = row_pointers(residual, residual_pitch, HEAD_DIM // 2, DIM // 2, HEADS, ROWS)
    tl.store(place, (even & 0x0F) | (odd << 4), mask=there)
    scales = _scale_pointers(anchor, anchor_pitch, HEADS, HEAD_DIM, ROWS)
    tl.store(scales, scale.to(tl.uint8), mask=token < num_tokens)


@triton.jit(do_not_specialize=["num_tokens"])
def _decode(
    layers,
    slots,
    index,
    num_tokens,
    stride_block,
    stride_head,
    stride_token,
    to_raw,
    level,
    anchor,
    anchor_pitch,
    residual,
    residual_pitch,
    STAGES: tl.constexpr,
    REFINED: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KIND: tl.constexpr,
    IN_ROWS: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
):
    token, _ = locate(HEADS, ROWS)
    there = vector_mask(num_tokens, HEAD_DIM // 2, DIM // 2, HEADS, ROWS)
    place = row_pointers(anchor, anchor_pitch, HEAD_DIM // 2, DIM // 2, HEADS, ROWS)
    coarse = tl.load(place, mask=there, other=0)
    if REFINED:
        place = row_pointers(residual, residual_pitch, HEAD_DIM // 2, DIM // 2, HEADS, ROWS)
        fine = tl.load(place, mask=there, other=0)
        even, odd = (coarse << 4) | (fine & 0x0F), (coarse & 0xF0) | (fine >> 4)
    else:
        even, odd = coarse & 0x0F, coarse >> 4
    scales = _scale_pointers(anchor, anchor_pitch, HEADS, HEAD_DIM, ROWS)
    factor = tl.load(to_raw + tl.load(scales, mask=token < num_tokens, other=0))
    u = tl.reshape(tl.join(tl.load(level + even), tl.load(level + odd)), (ROWS, DIM))
    y = walsh_hadamard(u * factor[:, None], STAGES)

    elements, mask = element_pointers(
        layers, slots, index, num_tokens, stride_block, stride_head, stride_token,
        HEADS, HEAD_DIM, DIM, BLOCK_SIZE, KIND, IN_ROWS, ALIGNED, ROWS,
    )  # fmt: skip
    tl.store(elements, from_single(y, KIND), mask=mask)
