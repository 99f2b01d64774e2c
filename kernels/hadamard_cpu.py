# SPDX-License-Identifier: Apache-2.0
"""Hadamard codec, numba: fused page -> tier rows and tier rows -> page, one layer a call.

Same operations in the same order as `hadamard.py`, which explains them; results are equal bit
for bit. Callers pass validated arrays: the kernels check no bounds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numba
import numpy as np
from lynx_kernels import hadamard
from lynx_kernels.anchor_code import GRID
from lynx_kernels.hadamard import hadamard_tables
from lynx_kernels.paged import PagedKVCache
from lynx_kernels.tile_cpu import (
    LANES,
    PAGE_TYPES,
    READ_ROWS,
    RUN,
    WRITE_ROWS,
    as_bits,
    as_float,
    compile_kernel,
    load_tile,
    locate,
    page_arguments,
    storage_type,
    store_tile,
)
from numba import types
from numpy import uint8, uint32, uint64
from numpy.typing import NDArray

_STEP_MANTISSAS = tuple(uint32(mantissa) for mantissa in hadamard.STEP_MANTISSAS)
_TINY = uint32(hadamard.TINY_BITS)
_INFINITY = uint32(hadamard.INFINITY_BITS)
_MAGNITUDE = uint32(0x7FFFFFFF)
_BIAS = hadamard.SCALE_BIAS - 127 * hadamard.STEPS_PER_OCTAVE
_ZERO, _MIN, _MAX, _NONFINITE = (
    hadamard.SCALE_ZERO,
    hadamard.SCALE_MIN,
    hadamard.SCALE_MAX,
    hadamard.SCALE_NONFINITE,
)
_CENTRE = np.float32(GRID)
_LAST = np.float32(2 * GRID)


def encode_layer(
    cache: PagedKVCache,
    layer: int,
    slots: NDArray[np.int64],
    anchor: NDArray[np.uint8],
    residual: NDArray[np.uint8],
) -> None:
    """Encode one layer's K and V at `slots` into its columns of the tier rows.

    slots: int64 [T], checked; anchor: uint8 [T, L*2*H*(D/2 + 1)], codes [L, 2, H, D/2] and then
    scales [L, 2, H]; residual: uint8 [T, L*2*H*D/2]. Rows must be C-contiguous.
    """
    tables = hadamard_tables(cache.head_dim)
    _encoder(cache.dtype.itemsize)(
        *page_arguments(cache, layer, slots),
        tables.transform,
        tables.norm,
        tables.to_grid,
        tables.code.code_of_grid,
        layer,
        cache.num_layers,
        anchor,
        residual,
    )


def decode_layer(
    cache: PagedKVCache,
    layer: int,
    slots: NDArray[np.int64],
    anchor: NDArray[np.uint8],
    residual: NDArray[np.uint8] | None,
) -> None:
    """Write one layer's K and V at `slots` from the anchor, refined by the residual if given."""
    tables = hadamard_tables(cache.head_dim)
    refined = residual is not None
    _decoder(cache.dtype.itemsize)(
        *page_arguments(cache, layer, slots),
        tables.transform,
        tables.to_raw,
        tables.code.refined_level if refined else tables.code.anchor_level,
        layer,
        cache.num_layers,
        anchor,
        residual if residual is not None else anchor,
        refined,
    )


@functools.cache
def _encoder(itemsize: int) -> Callable[..., None]:
    table = types.Array(types.float32, 1, "C", readonly=True)
    lookup = types.Array(types.uint8, 1, "C", readonly=True)
    integer = types.int64
    return compile_kernel(
        _encode,
        storage_type(itemsize),
        *PAGE_TYPES,
        *(integer, types.float32, table, lookup, integer, integer, WRITE_ROWS, WRITE_ROWS),
    )


@functools.cache
def _decoder(itemsize: int) -> Callable[..., None]:
    table = types.Array(types.float32, 1, "C", readonly=True)
    integer = types.int64
    return compile_kernel(
        _decode,
        storage_type(itemsize),
        *PAGE_TYPES,
        *(integer, table, table, integer, integer, READ_ROWS, READ_ROWS, types.boolean),
    )


def _encode(
    flat,
    kind,
    block_size,
    stride_block,
    stride_head,
    num_heads,
    k_index,
    v_index,
    slots,
    transform,
    norm,
    to_grid,
    code_of_grid,
    layer,
    num_layers,
    anchor,
    residual,
):
    half = k_index.shape[1] // 2
    tile = np.empty(2 * half * LANES, np.float32)
    bits = tile.view(uint32)
    codes = np.empty(2 * half * LANES, uint8)
    anchor_bytes = np.empty(half * LANES, uint8)
    residual_bytes = np.empty(half * LANES, uint8)
    page = np.empty(LANES, np.int64)
    offset = np.empty(LANES, np.int64)
    factor = np.empty(LANES, np.float32)
    scales = np.empty(LANES, uint8)
    scale_column = num_layers * 2 * num_heads * half
    for run in range(0, slots.size, RUN):
        for vector in range(2 * num_heads):
            index = k_index if vector < num_heads else v_index
            head_offset = (vector % num_heads) * stride_head
            column = layer * 2 * num_heads + vector
            for first in range(run, min(run + RUN, slots.size), LANES):
                lanes = min(LANES, slots.size - first)
                locate(slots, first, lanes, block_size, stride_block, head_offset, page, offset)
                load_tile(flat, kind, index, page, offset, lanes, bits)
                _butterflies(tile, transform)
                _scales(tile, bits, norm, to_grid, factor, scales)
                _quantise(tile, factor, code_of_grid, codes)
                _split(codes, anchor_bytes, residual_bytes)
                start = column * half
                for w in range(lanes):
                    token = first + w
                    for j in range(half):
                        anchor[token, uint64(start + j)] = anchor_bytes[uint64(j * LANES + w)]
                    for j in range(half):
                        residual[token, uint64(start + j)] = residual_bytes[uint64(j * LANES + w)]
                    anchor[token, uint64(scale_column + column)] = scales[w]


def _decode(
    flat,
    kind,
    block_size,
    stride_block,
    stride_head,
    num_heads,
    k_index,
    v_index,
    slots,
    transform,
    to_raw,
    level,
    layer,
    num_layers,
    anchor,
    residual,
    refined,
):
    half = k_index.shape[1] // 2
    tile = np.empty(2 * half * LANES, np.float32)
    bits = tile.view(uint32)
    codes = np.zeros(2 * half * LANES, uint8)
    page = np.empty(LANES, np.int64)
    offset = np.empty(LANES, np.int64)
    factor = np.zeros(LANES, np.float32)
    scale_column = num_layers * 2 * num_heads * half
    for run in range(0, slots.size, RUN):
        for vector in range(2 * num_heads):
            index = k_index if vector < num_heads else v_index
            head_offset = (vector % num_heads) * stride_head
            column = layer * 2 * num_heads + vector
            for first in range(run, min(run + RUN, slots.size), LANES):
                lanes = min(LANES, slots.size - first)
                locate(slots, first, lanes, block_size, stride_block, head_offset, page, offset)
                for w in range(lanes):
                    factor[w] = to_raw[anchor[first + w, uint64(scale_column + column)]]
                if refined:
                    _read_refined(anchor, residual, first, lanes, column * half, half, codes)
                else:
                    _read_anchor(anchor, first, lanes, column * half, half, codes)
                _levels(codes, level, factor, tile)
                _butterflies(tile, transform)
                store_tile(flat, kind, index, page, offset, lanes, bits)


@numba.njit
def _butterflies(tile, transform):
    """Unnormalised Walsh-Hadamard transform along the elements of every lane, in place."""
    distance = LANES
    while distance < transform * LANES:
        for start in range(0, tile.size, 2 * distance):
            for i in range(uint64(start), uint64(start + distance)):
                low = tile[uint64(i)]
                high = tile[uint64(i + uint64(distance))]
                tile[uint64(i)] = low + high
                tile[uint64(i + uint64(distance))] = low - high
        distance *= 2


@numba.njit
def _scales(tile, bits, norm, to_grid, factor, scales):
    """Scale byte and quantiser factor of every lane."""
    maximum = np.zeros(LANES, uint32)
    for d in range(tile.size // LANES):
        for w in range(LANES):
            magnitude = uint32(bits[uint64(d * LANES + w)] & _MAGNITUDE)
            maximum[w] = max(maximum[w], magnitude)
    for w in range(LANES):
        norm_bits = as_bits(as_float(maximum[w]) * norm)
        mantissa = uint32(norm_bits & uint32(0x7FFFFF))
        code = np.int64(norm_bits >> uint32(23)) * 8 + _BIAS
        for step in _STEP_MANTISSAS:
            code += mantissa > step
        code = min(max(code, _MIN), _MAX)
        if norm_bits < _TINY:
            code = _ZERO
        if maximum[w] >= _INFINITY:
            code = _NONFINITE
        scales[w] = code
        factor[w] = to_grid[uint8(code)]


@numba.njit
def _quantise(tile, factor, code_of_grid, codes):
    for d in range(tile.size // LANES):
        for w in range(LANES):
            i = uint64(d * LANES + w)
            position = tile[i] * factor[w] + _CENTRE
            # Written so that NaN becomes 0.
            position = position if position > np.float32(0) else np.float32(0)
            position = position if position < _LAST else _LAST
            tile[i] = position
    for i in range(tile.size):
        codes[i] = code_of_grid[uint64(uint32(tile[i]))]


@numba.njit
def _split(codes, anchor_bytes, residual_bytes):
    """Nibbles of neighbouring elements into one byte, the even element low."""
    for j in range(anchor_bytes.size // LANES):
        for w in range(LANES):
            even = codes[uint64(2 * j * LANES + w)]
            odd = codes[uint64((2 * j + 1) * LANES + w)]
            i = uint64(j * LANES + w)
            anchor_bytes[i] = (even >> uint8(4)) | (odd & uint8(0xF0))
            residual_bytes[i] = (even & uint8(0x0F)) | ((odd & uint8(0x0F)) << uint8(4))


@numba.njit
def _read_anchor(anchor, first, lanes, start, half, codes):
    for w in range(lanes):
        for j in range(half):
            byte = anchor[first + w, uint64(start + j)]
            codes[uint64(2 * j * LANES + w)] = byte & uint8(0x0F)
            codes[uint64((2 * j + 1) * LANES + w)] = byte >> uint8(4)


@numba.njit
def _read_refined(anchor, residual, first, lanes, start, half, codes):
    for w in range(lanes):
        for j in range(half):
            coarse = anchor[first + w, uint64(start + j)]
            fine = residual[first + w, uint64(start + j)]
            codes[uint64(2 * j * LANES + w)] = (coarse << uint8(4)) | (fine & uint8(0x0F))
            codes[uint64((2 * j + 1) * LANES + w)] = (coarse & uint8(0xF0)) | (fine >> uint8(4))


@numba.njit
def _levels(codes, level, factor, tile):
    for i in range(tile.size):
        tile[i] = level[uint64(codes[i])]
    for d in range(tile.size // LANES):
        for w in range(LANES):
            tile[uint64(d * LANES + w)] *= factor[w]
