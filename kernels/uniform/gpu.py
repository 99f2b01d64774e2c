# SPDX-License-Identifier: Apache-2.0
"""Plain symmetric integer codec, Triton: bit-equal twin of `reference.py`, all layers a launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from lynx_kernels.shared.paged import PagedKVCache
from lynx_kernels.shared.tiles_gpu import (
    INFINITY,
    MAGNITUDE,
    OPTIONS,
    element_pointers,
    from_single,
    grid,
    locate,
    page_arguments,
    row_pointers,
    to_single,
    vector_mask,
)
from lynx_kernels.uniform import reference as uniform

_TINY = tl.constexpr(uniform.TINY_BITS)
_NAN_SCALE = tl.constexpr(uniform.NAN_SCALE)
_ROUNDER = tl.constexpr(float(3 << 22))  # x + 1.5 * 2^23 rounds x half to even into the low bits


def encode(cache: PagedKVCache, slots: torch.Tensor, rows: torch.Tensor, bits: int) -> None:
    """Encode K and V of every layer at `slots` into rows on the cache's device.

    slots: int64 [T], inside the cache; rows: uint8 [T, L*2*H*(D*bits/8 + 2)], codes
    [L, 2, H, D*bits/8] and then scales [L, 2, H, 2]; C-contiguous, aligned to 2 bytes.
    """
    qmax = uniform.QMAX[bits]
    _encode[grid(cache, len(slots))](
        **page_arguments(cache, slots),
        rows=rows,
        pitch=rows.stride(0),
        reciprocal=uniform._reciprocal(qmax),
        QMAX=float(qmax),
        BITS=bits,
        **OPTIONS,
    )


def decode(cache: PagedKVCache, slots: torch.Tensor, rows: torch.Tensor, bits: int) -> None:
    """Write K and V of every layer at `slots`, which must not repeat, from the rows."""
    _decode[grid(cache, len(slots))](
        **page_arguments(cache, slots), rows=rows, pitch=rows.stride(0), BITS=bits, **OPTIONS
    )


@triton.jit
def _scale_pointers(rows, pitch, HEADS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Pointers [ROWS] to the scales behind all codes of a row; WIDTH: bytes of a vector's codes."""
    token, vector = locate(HEADS, ROWS)
    first = token.to(tl.int64) * pitch + tl.num_programs(1) * (2 * HEADS * WIDTH)
    number = tl.program_id(1) * (2 * HEADS) + vector
    return (rows + (first + 2 * number)).to(tl.pointer_type(tl.uint16), bitcast=True)


@triton.jit(do_not_specialize=["num_tokens"])
def _encode(
    layers,
    slots,
    index,
    num_tokens,
    stride_block,
    stride_head,
    stride_token,
    rows,
    pitch,
    reciprocal,
    QMAX: tl.constexpr,
    BITS: tl.constexpr,
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
    x = to_single(tl.load(elements, mask=mask, other=0), KIND)
    largest = tl.max(x.to(tl.int32, bitcast=True) & MAGNITUDE, axis=1)
    step = (largest.to(tl.float32, bitcast=True) * reciprocal).to(tl.int32, bitcast=True)
    scale = tl.where(largest < INFINITY, (step + 0xFFFF) >> 16, _NAN_SCALE)
    scale = tl.where(largest < _TINY, 0, scale)
    usable = (largest >= _TINY) & (largest < INFINITY)
    divisor = tl.where(usable, (scale << 16).to(tl.float32, bitcast=True), 1.0)
    inverse = tl.where(usable, tl.div_rn(1.0, divisor), 0.0)
    q = x * inverse[:, None]
    q = tl.where(q > -QMAX, q, -QMAX)  # NaN too
    q = tl.where(q < QMAX, q, QMAX)
    code = (q + _ROUNDER).to(tl.int32, bitcast=True)
    if BITS == 8:
        codes = code.to(tl.uint8)
    else:
        even, odd = tl.split(tl.reshape((code + 8) & 0x0F, (ROWS, DIM // 2, 2)))
        codes = (even | (odd << 4)).to(tl.uint8)
    width: tl.constexpr = HEAD_DIM * BITS // 8
    place = row_pointers(rows, pitch, width, DIM * BITS // 8, HEADS, ROWS)
    tl.store(place, codes, mask=vector_mask(num_tokens, width, DIM * BITS // 8, HEADS, ROWS))
    token, _ = locate(HEADS, ROWS)
    scales = _scale_pointers(rows, pitch, HEADS, width, ROWS)
    tl.store(scales, scale.to(tl.uint16), mask=token < num_tokens)


@triton.jit(do_not_specialize=["num_tokens"])
def _decode(
    layers,
    slots,
    index,
    num_tokens,
    stride_block,
    stride_head,
    stride_token,
    rows,
    pitch,
    BITS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KIND: tl.constexpr,
    IN_ROWS: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
):
    width: tl.constexpr = HEAD_DIM * BITS // 8
    place = row_pointers(rows, pitch, width, DIM * BITS // 8, HEADS, ROWS)
    there = vector_mask(num_tokens, width, DIM * BITS // 8, HEADS, ROWS)
    codes = tl.load(place, mask=there, other=0)
    if BITS == 8:
        q = codes.to(tl.int8, bitcast=True).to(tl.float32)
    else:
        pairs = tl.join(codes & 0x0F, codes >> 4)
        q = (tl.reshape(pairs, (ROWS, DIM)).to(tl.int32) - 8).to(tl.float32)
    token, _ = locate(HEADS, ROWS)
    scales = _scale_pointers(rows, pitch, HEADS, width, ROWS)
    scale = tl.load(scales, mask=token < num_tokens, other=0).to(tl.int32) << 16
    elements, mask = element_pointers(
        layers, slots, index, num_tokens, stride_block, stride_head, stride_token,
        HEADS, HEAD_DIM, DIM, BLOCK_SIZE, KIND, IN_ROWS, ALIGNED, ROWS,
    )  # fmt: skip
    value = q * scale.to(tl.float32, bitcast=True)[:, None]
    tl.store(elements, from_single(value, KIND), mask=mask)
