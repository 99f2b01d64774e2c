# SPDX-License-Identifier: Apache-2.0
"""Codec `klt`, numba: pages to tier rows. `reference.py` explains the operations."""

from __future__ import annotations

import numba
import numpy as np
from lynx_kernels.hadamard import reference as hadamard
from lynx_kernels.hadamard.cpu import butterflies, lane_scales
from lynx_kernels.klt.cpu_bits import pack, put
from lynx_kernels.klt.cpu_tiles import add, multiply, scaled, turn
from lynx_kernels.klt.reference import MAX_WIDTH
from lynx_kernels.shared.tiles_cpu import (
    CHUNK,
    LANES,
    RUN,
    largest_magnitudes,
    load_tile,
    locate,
)
from numpy import uint8, uint32, uint64

_STEP_MANTISSAS = tuple(uint32(mantissa) for mantissa in hadamard.STEP_MANTISSAS)
_TINY = uint32(hadamard.TINY_BITS)
_STEPS = hadamard.STEPS_PER_OCTAVE
_BIAS = hadamard.SCALE_BIAS - 127 * hadamard.STEPS_PER_OCTAVE
_ZERO, _MIN, _NONFINITE = hadamard.SCALE_ZERO, hadamard.SCALE_MIN, hadamard.SCALE_NONFINITE
_V_MIDDLE = np.float32(8192)
_V_LAST = np.float32(16384)


def encode(
    flat,
    kind,
    block_size,
    stride_block,
    stride_head,
    num_heads,
    k_index,
    v_index,
    slots,
    cos,
    sin,
    is_neox,
    analysis,
    mean,
    span,
    inverse_span,
    upper,
    lower,
    scale_inverse,
    transform,
    norm,
    to_grid,
    code9_of_grid,
    layer,
    num_layers,
    anchor,
    residual,
    anchor_bytes,
    k_bytes,
    v_bytes,
):
    head_dim = k_index.shape[1]
    tile = np.empty(head_dim * LANES, np.float32)
    bits = tile.view(uint32)
    work = np.empty(head_dim * LANES, np.float32)
    code = np.empty(head_dim * LANES, uint32)
    words = np.zeros(LANES * (head_dim * MAX_WIDTH // 32 + 1), uint32)
    packed = words.view(uint8)
    held = np.empty(LANES, uint64)
    page = np.empty(LANES, np.int64)
    offset = np.empty(LANES, np.int64)
    factor = np.empty(CHUNK, np.float32)
    maximum = np.empty(CHUNK, uint32)
    scales = np.empty(LANES, uint8)
    scale_column = num_layers * 2 * num_heads * anchor_bytes
    layer_column = layer * num_heads * (k_bytes + v_bytes)
    for run in range(0, slots.size, RUN):
        for vector in range(2 * num_heads):
            is_key = vector < num_heads
            index = k_index if is_key else v_index
            head = vector % num_heads
            column = layer * 2 * num_heads + vector
            rest_bytes = k_bytes if is_key else v_bytes
            rest_column = layer_column + head * rest_bytes
            if not is_key:
                rest_column += num_heads * k_bytes
            for first in range(run, min(run + RUN, slots.size), LANES):
                lanes = min(LANES, slots.size - first)
                locate(
                    slots, first, lanes, block_size, stride_block, head * stride_head, page, offset
                )
                load_tile(flat, kind, index, page, offset, lanes, bits)
                if is_key:
                    turn(tile, cos[first // LANES], sin[first // LANES], is_neox, np.float32(-1))
                    add(tile, mean[vector], np.float32(-1))
                    multiply(analysis[head], tile, work)
                    scaled(work, inverse_span[head], tile)
                    largest_magnitudes(bits, maximum)
                    _key_scales(maximum, scale_inverse, factor, scales)
                    _key_codes(work, factor, span[head], code)
                else:
                    add(tile, mean[vector], np.float32(-1))
                    butterflies(tile, transform)
                    lane_scales(bits, norm, to_grid, maximum, factor, scales)
                    _value_codes(tile, factor, code9_of_grid, code)
                pack(code, upper[vector], lower[vector], held, words)
                put(packed, anchor, first, lanes, column * anchor_bytes, anchor_bytes)
                for w in range(lanes):
                    anchor[first + w, uint64(scale_column + column)] = scales[w]
                pack(code, lower[vector], None, held, words)
                put(packed, residual, first, lanes, rest_column, rest_bytes)


@numba.njit(error_model="numpy")
def _key_scales(maximum, scale_inverse, factor, scales):
    """Scale byte of every lane from its largest share of the range, and its reciprocal."""
    for w in range(LANES):
        largest = maximum[w]
        mantissa = uint32(largest & uint32(0x7FFFFF))
        code = int(largest >> uint32(23)) * _STEPS + _BIAS
        for step in _STEP_MANTISSAS:
            if mantissa > step:
                code += 1
        code = min(max(code, _MIN), _NONFINITE)
        if largest < _TINY:
            code = _ZERO
        scales[w] = code
        for row in range(CHUNK // LANES):
            factor[row * LANES + w] = scale_inverse[uint8(code)]


@numba.njit(error_model="numpy")
def _key_codes(work, factor, span, code):
    for start in range(0, work.size, CHUNK):
        for i in range(CHUNK):
            at = uint64(start + i)
            reach = span[at]
            place = (work[at] * factor[i] + reach) * np.float32(0.5)
            # Written so that NaN becomes 0.
            place = place if place > np.float32(0) else np.float32(0)
            place = place if place < reach - np.float32(1) else reach - np.float32(1)
            code[at] = uint32(np.int32(place))


@numba.njit(error_model="numpy")
def _value_codes(tile, factor, code9_of_grid, code):
    for start in range(0, tile.size, CHUNK):
        for i in range(CHUNK):
            place = tile[uint64(start + i)] * (factor[uint64(i)] * np.float32(2)) + _V_MIDDLE
            place = place if place > np.float32(0) else np.float32(0)
            place = place if place < _V_LAST else _V_LAST
            code[uint64(start + i)] = uint32(np.int32(place))
    for d in range(0, tile.size // LANES, 2):
        for w in range(LANES):
            even = uint64(d * LANES + w)
            odd = uint64(even + uint64(LANES))
            code[even] = code9_of_grid[code[even]]
            code[odd] = code9_of_grid[code[odd]] >> uint32(1)
