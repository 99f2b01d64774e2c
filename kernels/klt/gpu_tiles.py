# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels of codec `klt` share: addresses, rows, bits and rotation of a tile."""

from __future__ import annotations

import triton
import triton.language as tl
from lynx_kernels.shared.tiles_gpu import FLOAT32


@triton.jit
def tokens(num_tokens, ROWS: tl.constexpr):
    """Tokens of the tile int32 [ROWS], and which of them exist."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    return token, token < num_tokens


@triton.jit
def elements(
    layers,
    slots,
    index,
    num_tokens,
    stride_block,
    stride_head,
    stride_token,
    d,
    KV: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KIND: tl.constexpr,
    IN_ROWS: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Pointers to elements d [1, n] of the tile's vectors, and which of them exist."""
    token, valid = tokens(num_tokens, ROWS)
    slot = tl.load(slots + token, mask=valid, other=0)
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    page = block * stride_block + tl.program_id(1) * stride_head
    mask = valid[:, None] & (d < HEAD_DIM)
    if IN_ROWS:
        inside = (offset * stride_token + KV * HEAD_DIM)[:, None] + d
    else:
        first = (KV * BLOCK_SIZE + offset) * HEAD_DIM
        inside = tl.load(index + first[:, None] + d, mask=mask, other=0)
    address = tl.load(layers + tl.program_id(2))
    if KIND == FLOAT32:
        base = address.to(tl.pointer_type(tl.uint32))
    else:
        base = address.to(tl.pointer_type(tl.uint16))
    if ALIGNED:
        base = tl.multiple_of(base, 16)
    return base + (page[:, None] + inside), mask


@triton.jit
def vector(KV: tl.constexpr, HEADS: tl.constexpr):
    """Number of the program's vector among those of a token."""
    return (tl.program_id(2) * 2 + KV) * HEADS + tl.program_id(1)


@triton.jit
def rows_of(
    rows,
    pitch,
    num_tokens,
    KV: tl.constexpr,
    IS_ANCHOR: tl.constexpr,
    HEADS: tl.constexpr,
    UPPER_BYTES: tl.constexpr,
    K_BYTES: tl.constexpr,
    V_BYTES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Pointers [ROWS] to the first byte of the program's vectors in a tier."""
    token, _ = tokens(num_tokens, ROWS)
    if IS_ANCHOR:
        column = vector(KV, HEADS) * UPPER_BYTES
    elif KV == 0:
        column = tl.program_id(2) * (HEADS * (K_BYTES + V_BYTES)) + tl.program_id(1) * K_BYTES
    else:
        column = tl.program_id(2) * (HEADS * (K_BYTES + V_BYTES)) + HEADS * K_BYTES
        column += tl.program_id(1) * V_BYTES
    return rows + token.to(tl.int64) * pitch + column


@triton.jit
def scales_of(
    anchor,
    pitch,
    num_tokens,
    KV: tl.constexpr,
    HEADS: tl.constexpr,
    UPPER_BYTES: tl.constexpr,
    ROWS: tl.constexpr,
):
    token, _ = tokens(num_tokens, ROWS)
    column = tl.num_programs(2) * (2 * HEADS * UPPER_BYTES) + vector(KV, HEADS)
    return anchor + token.to(tl.int64) * pitch + column


@triton.jit
def put(
    code,
    source,
    place,
    num_tokens,
    KV: tl.constexpr,
    BYTES: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Pack codes int32 [ROWS, DIM] into BYTES bytes a vector; source: see `_map`."""
    _, valid = tokens(num_tokens, ROWS)
    j = tl.arange(0, DIM)[None, :]
    source += vector(KV, HEADS) * (8 * HEAD_DIM)
    byte = tl.zeros((ROWS, DIM), tl.int32)
    for bit in range(8):  # a loop: unrolled it takes most of a minute to compile
        number = tl.load(source + j * 8 + bit, mask=j < BYTES, other=0)
        number = tl.broadcast_to(number, (ROWS, DIM))
        byte |= ((tl.gather(code, number >> 4, 1) >> (number & 15)) & 1) << bit
    mask = valid[:, None] & (j < BYTES)
    tl.store(place[:, None] + j, byte.to(tl.uint8), mask=mask)


@triton.jit
def get(
    place,
    start,
    width,
    d,
    num_tokens,
    KV: tl.constexpr,
    BYTES: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Fields int32 [ROWS, n] of components d [1, n]: at most 11 bits, hence in three bytes."""
    _, valid = tokens(num_tokens, ROWS)
    table = vector(KV, HEADS) * HEAD_DIM + d
    first = tl.load(start + table, mask=d < HEAD_DIM, other=0)
    bits = tl.load(width + table, mask=d < HEAD_DIM, other=0)
    word = tl.zeros((ROWS, d.shape[1]), tl.int32)
    for byte in tl.static_range(3):
        at = (first >> 3) + byte
        there = valid[:, None] & (at < BYTES)
        word |= tl.load(place[:, None] + at, mask=there, other=0).to(tl.int32) << (8 * byte)
    return (word >> (first & 7)) & ((1 << bits) - 1)


@triton.jit
def turned(
    x,
    other,
    cos,
    sin,
    pair,
    side,
    d,
    num_tokens,
    SIGN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """x [ROWS, n], elements d, rotated (SIGN -1) or rotated back (1); other: their partners."""
    token, valid = tokens(num_tokens, ROWS)
    number = tl.load(pair + d, mask=d < HEAD_DIM, other=-1)
    sign = SIGN * tl.load(side + d, mask=d < HEAD_DIM, other=1.0)
    mask = valid[:, None] & (number >= 0)
    at = token.to(tl.int64)[:, None] * PAIRS + number
    c, s = tl.load(cos + at, mask=mask, other=1.0), tl.load(sin + at, mask=mask, other=0.0)
    return tl.where(number >= 0, x * c + (other * s) * sign, x)
