# SPDX-License-Identifier: Apache-2.0
"""Tiles: how the Triton kernels read and write the paged cache, and where a tile's rows go.

One program takes ROWS head vectors of one layer: a [ROWS, DIM] tile in registers, DIM being
head_dim rounded up to a power of two. Vectors are counted token by token, then K before V, then by
head, which is their order in a tier row: neighbouring vectors fill neighbouring bytes there, and
all layers of a chunk are one launch.

Layers are reached through a table of their addresses. Dtype conversions to bfloat16 are done on
integer bits: rounding to nearest even, saturating instead of making an infinity, NaN stays NaN.

Launches are queued on torch's current stream. They check nothing; slots must lie inside the cache.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from lynx_kernels.shared.paged import PagedKVCache

# No contraction of a multiplication and an addition into one rounding: results are part of the
# wire format.
OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}

_TILE_ELEMENTS = 4096

BFLOAT16, FLOAT16, FLOAT32 = (tl.constexpr(kind) for kind in range(3))
_KIND = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}

INFINITY = tl.constexpr(0x7F800000)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_BFLOAT16_MAX = tl.constexpr(0x7F7F0000)
_FLOAT16_MAX = tl.constexpr(65504.0)
_FLOAT32_MAX = tl.constexpr(torch.finfo(torch.float32).max)


def grid(cache: PagedKVCache, num_tokens: int) -> tuple[int, int]:
    """Programs for all vectors of `num_tokens` tokens (at least one a layer: nothing to do is
    found inside)."""
    vectors = num_tokens * 2 * cache.num_kv_heads
    return max(1, triton.cdiv(vectors, _rows(cache))), cache.num_layers


def page_arguments(cache: PagedKVCache, slots: torch.Tensor) -> dict[str, Any]:
    """What every kernel takes of the cache; slots: int64 [T] on its device."""
    return {
        "layers": cache.layer_addresses,
        "slots": slots,
        "index": cache.device_index,
        "num_tokens": len(slots),
        "stride_block": cache.stride_block,
        "stride_head": cache.stride_head,
        "stride_token": cache.row_stride,
        "HEADS": cache.num_kv_heads,
        "HEAD_DIM": cache.head_dim,
        "DIM": triton.next_power_of_2(cache.head_dim),
        "BLOCK_SIZE": cache.block_size,
        "KIND": _KIND[cache.dtype],
        "IN_ROWS": cache.row_stride > 0,
        "ALIGNED": cache.addresses_aligned,
        "ROWS": _rows(cache),
    }


def device_table(array: Any, device: torch.device) -> torch.Tensor:
    """A read-only numpy table on the device, copied there once."""
    key = (id(array), device)
    if key not in _tables:
        _tables[key] = (array, torch.tensor(array, device=device))  # the array keeps its id taken
    return _tables[key][1]


_tables: dict[tuple[int, torch.device], tuple[Any, torch.Tensor]] = {}


def _rows(cache: PagedKVCache) -> int:
    return max(1, _TILE_ELEMENTS // triton.next_power_of_2(cache.head_dim))


@triton.jit
def locate(HEADS: tl.constexpr, ROWS: tl.constexpr):
    """(token, vector inside the layer) of the tile's vectors, int32 [ROWS] each."""
    number = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    return number // (2 * HEADS), number % (2 * HEADS)


@triton.jit
def element_pointers(
    layers,
    slots,
    index,
    num_tokens,
    stride_block,
    stride_head,
    stride_token,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KIND: tl.constexpr,
    IN_ROWS: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Pointers to the tile's elements [ROWS, DIM] in the cache, and which of them exist."""
    token, vector = locate(HEADS, ROWS)
    valid = token < num_tokens
    slot = tl.load(slots + token, mask=valid, other=0)
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    page = block * stride_block + (vector % HEADS) * stride_head
    d = tl.arange(0, DIM)[None, :]
    mask = valid[:, None] & (d < HEAD_DIM)
    if IN_ROWS:
        inside = (offset * stride_token + (vector // HEADS) * HEAD_DIM)[:, None] + d
    else:
        first = ((vector // HEADS) * BLOCK_SIZE + offset) * HEAD_DIM
        inside = tl.load(index + first[:, None] + d, mask=mask, other=0)
    address = tl.load(layers + tl.program_id(1))
    if KIND == FLOAT32:
        base = address.to(tl.pointer_type(tl.uint32))
    else:
        base = address.to(tl.pointer_type(tl.uint16))
    if ALIGNED:
        base = tl.multiple_of(base, 16)
    return base + (page[:, None] + inside), mask


@triton.jit
def to_single(stored, KIND: tl.constexpr):
    """float32 of the cache's bits; exact."""
    if KIND == BFLOAT16:
        value = (stored.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif KIND == FLOAT16:
        value = stored.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        value = stored.to(tl.float32, bitcast=True)
    return value


@triton.jit
def from_single(value, KIND: tl.constexpr):
    """The cache's bits of float32 values, rounded and saturated."""
    if KIND == BFLOAT16:
        bits = value.to(tl.int32, bitcast=True)
        magnitude = bits & MAGNITUDE
        limited = tl.minimum(magnitude, _BFLOAT16_MAX)
        rounded = (limited + 0x7FFF + ((limited >> 16) & 1)) >> 16
        rounded = tl.where(magnitude > INFINITY, 0x7FC0, rounded)
        stored = (rounded | ((bits >> 16) & 0x8000)).to(tl.uint16)
    elif KIND == FLOAT16:
        value = tl.where(value > _FLOAT16_MAX, _FLOAT16_MAX, value)
        value = tl.where(value < -_FLOAT16_MAX, -_FLOAT16_MAX, value)
        stored = value.to(tl.float16).to(tl.uint16, bitcast=True)
    else:
        value = tl.where(value > _FLOAT32_MAX, _FLOAT32_MAX, value)
        value = tl.where(value < -_FLOAT32_MAX, -_FLOAT32_MAX, value)
        stored = value.to(tl.uint32, bitcast=True)
    return stored


@triton.jit
def row_pointers(
    rows, pitch, width: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr
):
    """Pointers [ROWS, WIDTH] to the `width` units of each of the tile's vectors in tier rows.

    rows: [T, pitch], whose row begins with `width` units of each vector; WIDTH: width rounded up.
    """
    token, vector = locate(HEADS, ROWS)
    first = token.to(tl.int64) * pitch + (tl.program_id(1) * (2 * HEADS) + vector) * width
    return rows + first[:, None] + tl.arange(0, WIDTH)[None, :]


@triton.jit
def vector_mask(
    num_tokens,
    width: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Which of the units of `row_pointers` exist."""
    token, _ = locate(HEADS, ROWS)
    return (token < num_tokens)[:, None] & (tl.arange(0, WIDTH)[None, :] < width)
