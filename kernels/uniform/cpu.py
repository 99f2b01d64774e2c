# SPDX-License-Identifier: Apache-2.0
"""Plain symmetric integer codec, numba: bit-equal twin of `reference.py`, one layer a call."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numba
import numpy as np
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
from lynx_kernels.uniform import reference as uniform
from numba import types
from numpy import uint8, uint32, uint64
from numpy.typing import NDArray

_TINY = uint32(uniform.TINY_BITS)
_INFINITY = uint32(uniform.INFINITY_BITS)
_NAN_SCALE = uint32(uniform.NAN_SCALE)
_RECIPROCAL = {qmax: np.float32(uniform._reciprocal(qmax)) for qmax in uniform.QMAX.values()}
_ROUNDER = np.float32(3 << 22)  # x + 1.5 * 2^23 rounds x half to even into the low mantissa bits


def encode_layer(
    cache: PagedKVCache, layer: int, slots: NDArray[np.int64], rows: NDArray[np.uint8], bits: int
) -> None:
    """Encode one layer's K and V at `slots` into its columns of the rows.

    slots: int64 [T], checked; rows: uint8 [T, L*2*H*(D*bits/8 + 2)] C-contiguous, codes
    [L, 2, H, D*bits/8] and then scales [L, 2, H, 2].
    """
    qmax = uniform.QMAX[bits]
    _encoder(cache.dtype.itemsize)(
        *page_arguments(cache, layer, slots), layer, cache.num_layers, rows, bits, qmax,
        _RECIPROCAL[qmax],
    )  # fmt: skip


def decode_layer(
    cache: PagedKVCache, layer: int, slots: NDArray[np.int64], rows: NDArray[np.uint8], bits: int
) -> None:
    """Write one layer's K and V at `slots` from the rows."""
    _decoder(cache.dtype.itemsize)(
        *page_arguments(cache, layer, slots), layer, cache.num_layers, rows, bits
    )


_INTEGER = types.int64


@functools.cache
def _encoder(itemsize: int) -> Callable[..., None]:
    return compile_kernel(
        _encode, storage_type(itemsize), *PAGE_TYPES,
        *(_INTEGER, _INTEGER, WRITE_ROWS, _INTEGER, _INTEGER, types.float32),
    )  # fmt: skip


@functools.cache
def _decoder(itemsize: int) -> Callable[..., None]:
    return compile_kernel(
        _decode, storage_type(itemsize), *PAGE_TYPES, _INTEGER, _INTEGER, READ_ROWS, _INTEGER
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
    layer,
    num_layers,
    rows,
    code_bits,
    qmax,
    reciprocal,
):
    head_dim = k_index.shape[1]
    width = head_dim * code_bits // 8
    tile = np.empty(head_dim * LANES, np.float32)
    bits = tile.view(uint32)
    codes = np.empty(head_dim * LANES, uint8)
    page = np.empty(LANES, np.int64)
    offset = np.empty(LANES, np.int64)
    maximum = np.empty(CHUNK, uint32)
    inverse = np.empty(CHUNK, np.float32)
    scales = np.empty(LANES, uint32)
    scale_column = num_layers * 2 * num_heads * width
    for run in range(0, slots.size, RUN):
        for vector in range(2 * num_heads):
            index = k_index if vector < num_heads else v_index
            head_offset = (vector % num_heads) * stride_head
            column = layer * 2 * num_heads + vector
            for first in range(run, min(run + RUN, slots.size), LANES):
                lanes = min(LANES, slots.size - first)
                locate(slots, first, lanes, block_size, stride_block, head_offset, page, offset)
                load_tile(flat, kind, index, page, offset, lanes, bits)
                _scales(bits, reciprocal, maximum, inverse, scales)
                _quantise(tile, inverse, np.float32(qmax), codes)
                if code_bits == 4:
                    _pack(codes)
                start = column * width
                for w in range(lanes):
                    for j in range(width):
                        rows[first + w, uint64(start + j)] = codes[uint64(j * LANES + w)]
                    scale = scales[w]
                    place = scale_column + 2 * column
                    rows[first + w, uint64(place)] = uint8(scale & uint32(0xFF))
                    rows[first + w, uint64(place + 1)] = uint8(scale >> uint32(8))


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
    layer,
    num_layers,
    rows,
    code_bits,
):
    head_dim = k_index.shape[1]
    width = head_dim * code_bits // 8
    tile = np.zeros(head_dim * LANES, np.float32)
    bits = tile.view(uint32)
    page = np.empty(LANES, np.int64)
    offset = np.empty(LANES, np.int64)
    scale_column = num_layers * 2 * num_heads * width
    for run in range(0, slots.size, RUN):
        for vector in range(2 * num_heads):
            index = k_index if vector < num_heads else v_index
            head_offset = (vector % num_heads) * stride_head
            column = layer * 2 * num_heads + vector
            for first in range(run, min(run + RUN, slots.size), LANES):
                lanes = min(LANES, slots.size - first)
                locate(slots, first, lanes, block_size, stride_block, head_offset, page, offset)
                start = column * width
                for w in range(lanes):
                    place = scale_column + 2 * column
                    low = uint32(rows[first + w, uint64(place)])
                    high = uint32(rows[first + w, uint64(place + 1)])
                    scale = as_float(((high << uint32(8)) | low) << uint32(16))
                    if code_bits == 8:
                        for j in range(width):
                            code = np.int8(rows[first + w, uint64(start + j)])
                            tile[uint64(j * LANES + w)] = np.float32(code) * scale
                    else:
                        for j in range(width):
                            byte = rows[first + w, uint64(start + j)]
                            even = np.int32(byte & uint8(0x0F)) - 8
                            odd = np.int32(byte >> uint8(4)) - 8
                            tile[uint64(2 * j * LANES + w)] = np.float32(even) * scale
                            tile[uint64((2 * j + 1) * LANES + w)] = np.float32(odd) * scale
                store_tile(flat, kind, index, page, offset, lanes, bits)


@numba.njit(error_model="numpy")
def _scales(bits, reciprocal, maximum, inverse, scales):
    """bfloat16 scale (bits) of every lane, and its inverse for each element of a chunk."""
    largest_magnitudes(bits, maximum)
    for w in range(LANES):
        largest = maximum[w]
        step = as_bits(as_float(largest) * reciprocal)
        scale = uint32(uint32(step + uint32(0xFFFF)) >> uint32(16))
        factor = np.float32(1) / as_float(scale << uint32(16))
        if largest < _TINY:
            scale = uint32(0)
            factor = np.float32(0)
        if largest >= _INFINITY:
            scale = _NAN_SCALE
            factor = np.float32(0)
        scales[w] = scale
        for row in range(CHUNK // LANES):
            inverse[uint64(row * LANES + w)] = factor


@numba.njit
def _quantise(tile, inverse, qmax, codes):
    for start in range(0, tile.size, CHUNK):
        for i in range(CHUNK):
            q = tile[uint64(start + i)] * inverse[uint64(i)]
            # Written so that NaN becomes -qmax.
            q = q if q > -qmax else -qmax
            q = q if q < qmax else qmax
            codes[uint64(start + i)] = uint8(as_bits(q + _ROUNDER) & uint32(0xFF))


@numba.njit
def _pack(codes):
    """Two's complement codes of neighbouring elements into nibbles q + 8, in place."""
    for j in range(codes.size // (2 * LANES)):
        for w in range(LANES):
            even = (codes[uint64(2 * j * LANES + w)] + uint8(8)) & uint8(0x0F)
            odd = (codes[uint64((2 * j + 1) * LANES + w)] + uint8(8)) & uint8(0x0F)
            codes[uint64(j * LANES + w)] = even | (odd << uint8(4))
