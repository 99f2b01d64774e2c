# SPDX-License-Identifier: Apache-2.0
"""Hadamard codec, numba: fused page -> tier rows and tier rows -> page, one layer a call.

Same operations in the same order as `reference.py`, which explains them; results are equal bit
for bit. Callers pass validated arrays: the kernels check no bounds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numba
import numpy as np
from lynx_kernels.hadamard import reference as hadamard
from lynx_kernels.hadamard.reference import hadamard_tables
from lynx_kernels.shared.anchor_code import GRID
from lynx_kernels.shared.paged import PagedKVCache
from lynx_kernels.shared.tiles_cpu import (
    CHUNK,
    LANES,
    PAGE_TYPES,
    READ_ROWS,
    RUN,
    WRITE_ROWS,
    as_bits,
    as_float,
    compile_kernel,
    largest_magnitudes,
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
_STEPS = hadamard.STEPS_PER_OCTAVE
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
    position = np.empty(2 * half * LANES, uint32)
    page = np.empty(LANES, np.int64)
    offset = np.empty(LANES, np.int64)
    factor = np.empty(CHUNK, np.float32)
    maximum = np.empty(CHUNK, uint32)
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
                butterflies(tile, transform)
                lane_scales(bits, norm, to_grid, maximum, factor, scales)
                _positions(tile, factor, position)
                start = column * half
                for w in range(lanes):
                    for j in range(half):
                        even = code_of_grid[position[uint64(2 * j * LANES + w)]]
                        odd = code_of_grid[position[uint64((2 * j + 1) * LANES + w)]]
                        byte = (even >> uint8(4)) | (odd & uint8(0xF0))
                        anchor[first + w, uint64(start + j)] = byte
                        byte = (even & uint8(0x0F)) | ((odd & uint8(0x0F)) << uint8(4))
                        residual[first + w, uint64(start + j)] = byte
                    anchor[first + w, uint64(scale_column + column)] = scales[w]


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
    tile = np.zeros(2 * half * LANES, np.float32)
    bits = tile.view(uint32)
    page = np.empty(LANES, np.int64)
    offset = np.empty(LANES, np.int64)
    scale_column = num_layers * 2 * num_heads * half
    for run in range(0, slots.size, RUN):
        for vector in range(2 * num_heads):
            index = k_index if vector < num_heads else v_index
            head_offset = (vector % num_heads) * stride_head
            column = layer * 2 * num_heads + vector
            for first in range(run, min(run + RUN, slots.size), LANES):
                lanes = min(LANES, slots.size - first)
                locate(slots, first, lanes, block_size, stride_block, head_offset, page, offset)
                start = column * half
                for w in range(lanes):
                    factor = to_raw[anchor[first + w, uint64(scale_column + column)]]
                    for j in range(half):
                        coarse = anchor[first + w, uint64(start + j)]
                        if refined:
                            fine = residual[first + w, uint64(start + j)]
                            even = (coarse << uint8(4)) | (fine & uint8(0x0F))
                            odd = (coarse & uint8(0xF0)) | (fine >> uint8(4))
                        else:
                            even = coarse & uint8(0x0F)
                            odd = coarse >> uint8(4)
                        tile[uint64(2 * j * LANES + w)] = level[uint8(even)] * factor
                        tile[uint64((2 * j + 1) * LANES + w)] = level[uint8(odd)] * factor
                butterflies(tile, transform)
                store_tile(flat, kind, index, page, offset, lanes, bits)


@numba.njit
def butterflies(tile, transform):
    """Unnormalised Walsh-Hadamard transform along the elements of every lane, in place.

    Three stages (distances 1, 2, 4 times `distance`) are done while eight values are in
    registers; the sums are those of one stage after the other. Constant distances let the
    compiler see that the values do not overlap.
    """
    _eight(tile, LANES)
    if transform == 16:
        _two(tile, 8 * LANES)
    elif transform == 32:
        _four(tile, 8 * LANES)
    elif transform >= 64:
        _eight(tile, 8 * LANES)
        distance = 64 * LANES
        while distance < transform * LANES:
            _two(tile, distance)
            distance *= 2


@numba.njit
def _two(tile, distance):
    for start in range(0, tile.size, 2 * distance):
        for row in range(start, start + distance, LANES):
            for w in range(LANES):
                i = uint64(row + w)
                a, b = tile[i], tile[uint64(i + uint64(distance))]
                tile[i] = a + b
                tile[uint64(i + uint64(distance))] = a - b


@numba.njit
def _four(tile, distance):
    for start in range(0, tile.size, 4 * distance):
        for row in range(start, start + distance, LANES):
            for w in range(LANES):
                i0 = uint64(row + w)
                i1 = uint64(row + w + distance)
                i2 = uint64(row + w + 2 * distance)
                i3 = uint64(row + w + 3 * distance)
                a, b, c, d = tile[i0], tile[i1], tile[i2], tile[i3]
                a, b, c, d = a + b, a - b, c + d, c - d
                tile[i0], tile[i1], tile[i2], tile[i3] = a + c, b + d, a - c, b - d


@numba.njit
def _eight(tile, distance):
    for start in range(0, tile.size, 8 * distance):
        for row in range(start, start + distance, LANES):
            for w in range(LANES):
                i0 = uint64(row + w)
                i1 = uint64(row + w + distance)
                i2 = uint64(row + w + 2 * distance)
                i3 = uint64(row + w + 3 * distance)
                i4 = uint64(row + w + 4 * distance)
                i5 = uint64(row + w + 5 * distance)
                i6 = uint64(row + w + 6 * distance)
                i7 = uint64(row + w + 7 * distance)
                a, b, c, d = tile[i0], tile[i1], tile[i2], tile[i3]
                e, f, g, h = tile[i4], tile[i5], tile[i6], tile[i7]
                a, b, c, d = a + b, a - b, c + d, c - d
                e, f, g, h = e + f, e - f, g + h, g - h
                a, b, c, d = a + c, b + d, a - c, b - d
                e, f, g, h = e + g, f + h, e - g, f - h
                tile[i0], tile[i1], tile[i2], tile[i3] = a + e, b + f, c + g, d + h
                tile[i4], tile[i5], tile[i6], tile[i7] = a - e, b - f, c - g, d - h


@numba.njit
def lane_scales(bits, norm, to_grid, maximum, factor, scales):
    """Scale byte of every lane, and its quantiser factor for each element of a chunk."""
    largest_magnitudes(bits, maximum)
    for w in range(LANES):
        largest = maximum[w]
        norm_bits = as_bits(as_float(largest) * norm)
        mantissa = uint32(norm_bits & uint32(0x7FFFFF))
        code = int(norm_bits >> uint32(23)) * _STEPS + _BIAS
        for step in _STEP_MANTISSAS:
            if mantissa > step:
                code += 1
        code = min(max(code, _MIN), _MAX)
        if norm_bits < _TINY:
            code = _ZERO
        if largest >= _INFINITY:
            code = _NONFINITE
        scales[w] = code
        for row in range(CHUNK // LANES):
            factor[row * LANES + w] = to_grid[uint8(code)]


@numba.njit
def _positions(tile, factor, position):
    """Grid point of every coefficient."""
    for start in range(0, tile.size, CHUNK):
        for i in range(CHUNK):
            point = tile[uint64(start + i)] * factor[uint64(i)] + _CENTRE
            # Written so that NaN becomes 0.
            point = point if point > np.float32(0) else np.float32(0)
            point = point if point < _LAST else _LAST
            position[uint64(start + i)] = uint32(np.int32(point))
