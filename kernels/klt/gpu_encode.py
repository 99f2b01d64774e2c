# SPDX-License-Identifier: Apache-2.0
"""Codec `klt`, Triton: pages to tier rows. `reference.py` explains the operations."""

from __future__ import annotations

import triton
import triton.language as tl
from lynx_kernels.hadamard import reference as hadamard
from lynx_kernels.hadamard.gpu import scale_codes, walsh_hadamard
from lynx_kernels.klt.gpu_tiles import (
    elements,
    put,
    rows_of,
    scales_of,
    tokens,
    turned,
    vector,
)
from lynx_kernels.shared.tiles_gpu import MAGNITUDE, to_single

_STEP_MANTISSAS = tl.constexpr(tuple(int(mantissa) for mantissa in hadamard.STEP_MANTISSAS))
_STEPS = tl.constexpr(hadamard.STEPS_PER_OCTAVE)
_BIAS = tl.constexpr(hadamard.SCALE_BIAS)
_TINY = tl.constexpr(hadamard.TINY_BITS)
_V_MIDDLE = tl.constexpr(8192.0)
_V_LAST = tl.constexpr(16384.0)


@triton.jit(do_not_specialize=["num_tokens"])
def encode_k(
    layers,
    slots,
    index,
    num_tokens,
    stride_block,
    stride_head,
    stride_token,
    mean,
    anchor,
    anchor_pitch,
    residual,
    residual_pitch,
    upper_map,
    lower_map,
    analysis,
    span,
    pair,
    partner,
    side,
    cos,
    sin,
    inverses,
    PAIRS: tl.constexpr,
    UPPER_BYTES: tl.constexpr,
    K_BYTES: tl.constexpr,
    V_BYTES: tl.constexpr,
    CHUNK: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KIND: tl.constexpr,
    IN_ROWS: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
):
    head = tl.program_id(2) * HEADS + tl.program_id(1)
    i = tl.arange(0, DIM)[None, :]
    y = tl.zeros((ROWS, DIM), tl.float32)
    for start in range(0, HEAD_DIM, CHUNK):
        d = start + tl.arange(0, CHUNK)[None, :]
        here, mask = elements(
            layers, slots, index, num_tokens, stride_block, stride_head, stride_token, d,
            0, HEAD_DIM, BLOCK_SIZE, KIND, IN_ROWS, ALIGNED, ROWS,
        )  # fmt: skip
        other, _ = elements(
            layers, slots, index, num_tokens, stride_block, stride_head, stride_token,
            tl.load(partner + d), 0, HEAD_DIM, BLOCK_SIZE, KIND, IN_ROWS, ALIGNED, ROWS,
        )  # fmt: skip
        x = turned(
            to_single(tl.load(here, mask=mask, other=0), KIND),
            to_single(tl.load(other, mask=mask, other=0), KIND),
            cos, sin, pair, side, d, num_tokens, 1, HEAD_DIM, PAIRS, ROWS,
        )  # fmt: skip
        x -= tl.load(mean + vector(0, HEADS) * HEAD_DIM + d)
        column = start + tl.arange(0, CHUNK)[:, None]
        rows = analysis + (head * HEAD_DIM + i) * HEAD_DIM + column
        y = tl.dot(x, tl.load(rows, mask=i < HEAD_DIM, other=0.0), y, input_precision="ieee")
    wide = tl.load(span + head * HEAD_DIM + i, mask=i < HEAD_DIM, other=1.0)
    relative = y * tl.div_rn(1.0, wide)
    largest = tl.max(relative.to(tl.int32, bitcast=True) & MAGNITUDE, axis=1)
    scale = ((largest >> 23) - 127) * _STEPS + _BIAS
    for step in tl.static_range(_STEPS):
        scale += ((largest & 0x7FFFFF) > _STEP_MANTISSAS[step]).to(tl.int32)
    scale = tl.where(largest < _TINY, 0, tl.maximum(scale, 1))
    scale = tl.minimum(scale, 255)
    level = (y * tl.load(inverses + scale)[:, None] + wide) * 0.5
    level = tl.where(level > 0.0, level, 0.0)  # NaN too
    code = tl.where(level < wide - 1, level, wide - 1).to(tl.int32)
    place = rows_of(
        anchor, anchor_pitch, num_tokens, 0, True, HEADS, UPPER_BYTES, K_BYTES, V_BYTES, ROWS
    )
    put(code, upper_map, place, num_tokens, 0, UPPER_BYTES, HEADS, HEAD_DIM, DIM, ROWS)
    place = rows_of(
        residual, residual_pitch, num_tokens, 0, False, HEADS, UPPER_BYTES, K_BYTES, V_BYTES, ROWS
    )
    put(code, lower_map, place, num_tokens, 0, K_BYTES, HEADS, HEAD_DIM, DIM, ROWS)
    scales = scales_of(anchor, anchor_pitch, num_tokens, 0, HEADS, UPPER_BYTES, ROWS)
    _, valid = tokens(num_tokens, ROWS)
    tl.store(scales, scale.to(tl.uint8), mask=valid)


@triton.jit(do_not_specialize=["num_tokens"])
def encode_v(
    layers,
    slots,
    index,
    num_tokens,
    stride_block,
    stride_head,
    stride_token,
    mean,
    anchor,
    anchor_pitch,
    residual,
    residual_pitch,
    upper_map,
    lower_map,
    norm,
    to_grid,
    code9,
    STAGES: tl.constexpr,
    UPPER_BYTES: tl.constexpr,
    K_BYTES: tl.constexpr,
    V_BYTES: tl.constexpr,
    CHUNK: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KIND: tl.constexpr,
    IN_ROWS: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
):
    d = tl.arange(0, DIM)[None, :]
    here, mask = elements(
        layers, slots, index, num_tokens, stride_block, stride_head, stride_token, d,
        1, HEAD_DIM, BLOCK_SIZE, KIND, IN_ROWS, ALIGNED, ROWS,
    )  # fmt: skip
    x = to_single(tl.load(here, mask=mask, other=0), KIND)
    x -= tl.load(mean + vector(1, HEADS) * HEAD_DIM + d, mask=d < HEAD_DIM, other=0.0)
    v = walsh_hadamard(x, STAGES)
    scale = scale_codes(v, norm)
    position = v * (2 * tl.load(to_grid + scale))[:, None] + _V_MIDDLE
    position = tl.where(position > 0.0, position, 0.0)  # NaN too
    position = tl.where(position < _V_LAST, position, _V_LAST)
    code = tl.load(code9 + position.to(tl.int32)) >> (d & 1)
    place = rows_of(
        anchor, anchor_pitch, num_tokens, 1, True, HEADS, UPPER_BYTES, K_BYTES, V_BYTES, ROWS
    )
    put(code, upper_map, place, num_tokens, 1, UPPER_BYTES, HEADS, HEAD_DIM, DIM, ROWS)
    place = rows_of(
        residual, residual_pitch, num_tokens, 1, False, HEADS, UPPER_BYTES, K_BYTES, V_BYTES, ROWS
    )
    put(code, lower_map, place, num_tokens, 1, V_BYTES, HEADS, HEAD_DIM, DIM, ROWS)
    scales = scales_of(anchor, anchor_pitch, num_tokens, 1, HEADS, UPPER_BYTES, ROWS)
    _, valid = tokens(num_tokens, ROWS)
    tl.store(scales, scale.to(tl.uint8), mask=valid)
