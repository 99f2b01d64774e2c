# SPDX-License-Identifier: Apache-2.0
"""Codec `klt`, numba: tier rows to pages. `reference.py` explains the operations."""

from __future__ import annotations

import numba
import numpy as np
from lynx_kernels.hadamard.cpu import butterflies
from lynx_kernels.klt.cpu_bits import get, unpack
from lynx_kernels.klt.cpu_tiles import add, multiply, turn
from lynx_kernels.klt.reference import MAX_WIDTH
from lynx_kernels.shared.tiles_cpu import CHUNK, LANES, RUN, locate, store_tile
from numpy import uint8, uint32, uint64


def decode(
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
    synthesis,
    mean,
    span,
    unit,
    upper,
    lower,
    scale_value,
    transform,
    to_raw,
    even,
    odd,
    layer,
    num_layers,
    anchor,
    residual,
    refined,
    anchor_bytes,
    k_bytes,
    v_bytes,
):
    head_dim = k_index.shape[1]
    tile = np.zeros(head_dim * LANES, np.float32)
    bits = tile.view(uint32)
    work = np.empty(head_dim * LANES, np.float32)
    code = np.empty(head_dim * LANES, uint32)
    rest = np.empty(head_dim * LANES, uint32)
    words = np.zeros(LANES * (head_dim * MAX_WIDTH // 32 + 1), uint32)
    packed = words.view(uint8)
    held = np.empty(LANES, uint64)
    page = np.empty(LANES, np.int64)
    offset = np.empty(LANES, np.int64)
    factor = np.zeros(CHUNK, np.float32)
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
                get(packed, anchor, first, lanes, column * anchor_bytes, anchor_bytes)
                unpack(words, upper[vector], held, code)
                if refined:
                    get(packed, residual, first, lanes, rest_column, rest_bytes)
                    unpack(words, lower[vector], held, rest)
                    _join(code, lower[vector], rest, held.size)
                for w in range(lanes):
                    scale = anchor[first + w, uint64(scale_column + column)]
                    if is_key:
                        factor[w] = unit[head] * scale_value[scale]
                    else:
                        factor[w] = to_raw[scale]
                    for row in range(1, CHUNK // LANES):
                        factor[uint64(row * LANES + w)] = factor[w]
                if is_key:
                    if not refined:
                        _to_middles(code, lower[vector], held.size)
                    _levels(code, refined, span[head], work)
                    multiply(synthesis[head], work, tile)
                    _spread(tile, factor, mean[vector])
                    turn(tile, cos[first // LANES], sin[first // LANES], is_neox, np.float32(1))
                else:
                    for d in range(0, head_dim, 2):
                        for w in range(LANES):
                            i = uint64(d * LANES + w)
                            j = uint64(i + uint64(LANES))
                            tile[i] = even[code[i]] * factor[w]
                            tile[j] = odd[code[j]] * factor[w]
                    butterflies(tile, transform)
                    add(tile, mean[vector], np.float32(1))
                store_tile(flat, kind, index, page, offset, lanes, bits)


@numba.njit(error_model="numpy")
def _join(code, shift, rest, lanes):
    """Codes from their upper and lower bits."""
    for d in range(shift.size):
        up = uint32(shift[d])
        for w in range(lanes):
            at = uint64(d * lanes + w)
            code[at] = (code[at] << up) | rest[at]


@numba.njit(error_model="numpy")
def _to_middles(code, lost, lanes):
    """Twice the middle of the cell that codes without their lowest bits leave."""
    for d in range(lost.size):
        up = uint32(lost[d])
        for w in range(lanes):
            at = uint64(d * lanes + w)
            code[at] = ((code[at] << uint32(1)) | uint32(1)) << up


@numba.njit(error_model="numpy")
def _levels(code, refined, span, level):
    """Levels of K: of whole codes if refined, else of what already is twice a cell's middle."""
    if refined:
        for i in range(level.size):
            level[i] = np.float32(np.int32((code[i] << uint32(1)) | uint32(1))) - span[i]
    else:
        for i in range(level.size):
            level[i] = np.float32(np.int32(code[i])) - span[i]


@numba.njit(error_model="numpy")
def _spread(tile, factor, mean):
    """Scale and mean of K, each rounded."""
    for start in range(0, tile.size, CHUNK):
        for i in range(CHUNK):
            at = uint64(start + i)
            tile[at] = tile[at] * factor[i] + mean[at]
