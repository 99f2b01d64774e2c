# SPDX-License-Identifier: Apache-2.0
"""Codec `klt`, Triton: tier rows to pages. `reference.py` explains the operations."""

from __future__ import annotations

import triton
import triton.language as tl
from lynx_kernels.hadamard.gpu import walsh_hadamard
from lynx_kernels.klt.gpu_tiles import (
    elements,
    get,
    rows_of,
    scales_of,
    tokens,
    turned,
    vector,
)
from lynx_kernels.shared.tiles_gpu import from_single


@triton.jit(do_not_specialize=["num_tokens"])
def decode_k(
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
    upper,
    upper_start,
    lower,
    lower_start,
    basis,
    unit,
    span,
    pair,
    partner,
    side,
    cos,
    sin,
    values,
    REFINED: tl.constexpr,
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
    d = tl.arange(0, DIM)[None, :]
    real = d < HEAD_DIM
    above = rows_of(
        anchor, anchor_pitch, num_tokens, 0, True, HEADS, UPPER_BYTES, K_BYTES, V_BYTES, ROWS
    )
    below = rows_of(
        residual, residual_pitch, num_tokens, 0, False, HEADS, UPPER_BYTES, K_BYTES, V_BYTES, ROWS
    )
    exact = tl.zeros((ROWS, DIM), tl.float32)
    for start in range(0, HEAD_DIM, CHUNK):
        i = start + tl.arange(0, CHUNK)[None, :]
        code = get(above, upper_start, upper, i, num_tokens, 0, UPPER_BYTES, HEADS, HEAD_DIM, ROWS)
        lost = tl.load(lower + vector(0, HEADS) * HEAD_DIM + i)
        if REFINED:
            rest = get(below, lower_start, lower, i, num_tokens, 0, K_BYTES, HEADS, HEAD_DIM, ROWS)
            middle = (((code << lost) | rest) << 1) | 1
        else:
            middle = ((code << 1) | 1) << lost
        level = middle.to(tl.float32) - tl.load(span + head * HEAD_DIM + i)
        row = start + tl.arange(0, CHUNK)[:, None]
        matrix = tl.load(basis + (head * HEAD_DIM + row) * HEAD_DIM + d, mask=real, other=0.0)
        exact = tl.dot(level, matrix, exact, input_precision="tf32")
    swapped = tl.load(partner + d, mask=real, other=0)
    valid = tokens(num_tokens, ROWS)[1]
    scales = scales_of(anchor, anchor_pitch, num_tokens, 0, HEADS, UPPER_BYTES, ROWS)
    scale = tl.load(scales, mask=valid, other=0).to(tl.int32)
    factor = tl.load(unit + head) * tl.load(values + scale)
    k = exact * factor[:, None]
    k += tl.load(mean + vector(0, HEADS) * HEAD_DIM + d, mask=real, other=0.0)
    other = tl.gather(k, tl.broadcast_to(swapped, (ROWS, DIM)), 1)
    k = turned(k, other, cos, sin, pair, side, d, num_tokens, -1, HEAD_DIM, PAIRS, ROWS)
    here, mask = elements(
        layers, slots, index, num_tokens, stride_block, stride_head, stride_token, d,
        0, HEAD_DIM, BLOCK_SIZE, KIND, IN_ROWS, ALIGNED, ROWS,
    )  # fmt: skip
    tl.store(here, from_single(k, KIND), mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def decode_v(
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
    upper,
    upper_start,
    lower,
    lower_start,
    to_raw,
    levels,
    num_even,
    STAGES: tl.constexpr,
    REFINED: tl.constexpr,
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
    real = d < HEAD_DIM
    place = rows_of(
        anchor, anchor_pitch, num_tokens, 1, True, HEADS, UPPER_BYTES, K_BYTES, V_BYTES, ROWS
    )
    code = get(place, upper_start, upper, d, num_tokens, 1, UPPER_BYTES, HEADS, HEAD_DIM, ROWS)
    if REFINED:
        place = rows_of(
            residual, residual_pitch, num_tokens, 1, False, HEADS, UPPER_BYTES, K_BYTES, V_BYTES,
            ROWS,
        )  # fmt: skip
        rest = get(place, lower_start, lower, d, num_tokens, 1, V_BYTES, HEADS, HEAD_DIM, ROWS)
        lost = tl.load(lower + vector(1, HEADS) * HEAD_DIM + d, mask=real, other=0)
        code = (code << lost) | rest
    _, valid = tokens(num_tokens, ROWS)
    scales = scales_of(anchor, anchor_pitch, num_tokens, 1, HEADS, UPPER_BYTES, ROWS)
    factor = tl.load(to_raw + tl.load(scales, mask=valid, other=0).to(tl.int32))
    u = tl.load(levels + code + (d & 1) * num_even)
    v = walsh_hadamard(tl.where(real, u, 0.0) * factor[:, None], STAGES)
    v += tl.load(mean + vector(1, HEADS) * HEAD_DIM + d, mask=real, other=0.0)
    here, mask = elements(
        layers, slots, index, num_tokens, stride_block, stride_head, stride_token, d,
        1, HEAD_DIM, BLOCK_SIZE, KIND, IN_ROWS, ALIGNED, ROWS,
    )  # fmt: skip
    tl.store(here, from_single(v, KIND), mask=mask)
