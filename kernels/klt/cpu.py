# SPDX-License-Identifier: Apache-2.0
"""Codec `klt`, numba: fused page -> tier rows and tier rows -> page, one layer a call.

`reference.py` explains the operations. Reconstructions are equal bit for bit; K's codes may differ
by one where a sum of the encoder was rounded otherwise. Callers pass validated arrays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numba
import numpy as np
from lynx_kernels.hadamard import reference as hadamard
from lynx_kernels.hadamard.cpu import butterflies, lane_scales
from lynx_kernels.hadamard.reference import hadamard_tables
from lynx_kernels.klt import reference as klt
from lynx_kernels.klt.reference import MAX_WIDTH, KltCode
from lynx_kernels.shared.paged import PagedKVCache
from lynx_kernels.shared.tiles_cpu import (
    CHUNK,
    LANES,
    PAGE_TYPES,
    READ_ROWS,
    RUN,
    WRITE_ROWS,
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
_STEPS = hadamard.STEPS_PER_OCTAVE
_BIAS = hadamard.SCALE_BIAS - 127 * hadamard.STEPS_PER_OCTAVE
_ZERO, _MIN, _NONFINITE = hadamard.SCALE_ZERO, hadamard.SCALE_MIN, hadamard.SCALE_NONFINITE
_V_MIDDLE = np.float32(8192)
_V_LAST = np.float32(16384)


@dataclass(frozen=True)
class KltLayers:
    """A `KltCode` as the kernels read it, layer first.

    analysis, synthesis: float32 [L, H, D, D], row i gives component or element i; mean: float32
    [L, 2H, D * LANES], each value for all lanes, as all that is added to or multiplied with a tile;
    unit: float32 [L, H]; span, inverse_span: float32 [L, H, D * LANES], 2^total and its reciprocal;
    upper, lower: uint8 [L, 2H, D], bits in anchor and residual.
    """

    code: KltCode
    analysis: NDArray[np.float32]
    synthesis: NDArray[np.float32]
    mean: NDArray[np.float32]
    unit: NDArray[np.float32]
    span: NDArray[np.float32]
    inverse_span: NDArray[np.float32]
    upper: NDArray[np.uint8]
    lower: NDArray[np.uint8]

    @classmethod
    def of(cls, code: KltCode) -> KltLayers:
        layers, _, heads, head_dim = code.total.shape
        vectors = (layers, 2 * heads, head_dim)
        span = np.exp2(code.total[:, 0]).astype(np.float32)
        return cls(
            code,
            np.ascontiguousarray(code.analysis),
            np.ascontiguousarray(code.basis.swapaxes(-1, -2)),
            _for_lanes(np.stack((code.k_mean, code.v_mean), axis=1).reshape(vectors)),
            np.ascontiguousarray(code.k_unit),
            _for_lanes(span),
            _for_lanes(np.float32(1) / span),
            code.anchor.astype(np.uint8).reshape(vectors),
            code.lower.astype(np.uint8).reshape(vectors),
        )


def encode_layers(
    cache: PagedKVCache,
    slots: NDArray[np.int64],
    layers: KltLayers,
    anchor: NDArray[np.uint8],
    residual: NDArray[np.uint8],
    first_position: int,
) -> None:
    """Encode K and V at `slots` into the tier rows, C-contiguous uint8 [T, bytes] each."""
    code = layers.code
    tables = hadamard_tables(cache.head_dim)
    kernel = _encoder(cache.dtype.itemsize)
    cos, sin = _cos_sin(code, first_position, len(slots))
    for layer in range(cache.num_layers):
        kernel(
            *page_arguments(cache, layer, slots),
            cos,
            sin,
            code.rotation.is_neox,
            layers.analysis[layer],
            layers.mean[layer],
            layers.span[layer],
            layers.inverse_span[layer],
            layers.upper[layer],
            layers.lower[layer],
            klt.scale_inverses(),
            tables.transform,
            tables.norm,
            tables.to_grid,
            code.fine.code9_of_grid,
            layer,
            cache.num_layers,
            anchor,
            residual,
            *klt.vector_bytes(cache.head_dim, code.anchor_bits),
        )


def decode_layers(
    cache: PagedKVCache,
    slots: NDArray[np.int64],
    layers: KltLayers,
    anchor: NDArray[np.uint8],
    residual: NDArray[np.uint8] | None,
    first_position: int,
) -> None:
    """Write K and V at `slots` from the anchor, refined by the residual if given."""
    code = layers.code
    tables = hadamard_tables(cache.head_dim)
    kernel = _decoder(cache.dtype.itemsize)
    cos, sin = _cos_sin(code, first_position, len(slots))
    refined = residual is not None
    even, odd = code.v_levels(refined)
    for layer in range(cache.num_layers):
        kernel(
            *page_arguments(cache, layer, slots),
            cos,
            sin,
            code.rotation.is_neox,
            layers.synthesis[layer],
            layers.mean[layer],
            layers.span[layer],
            layers.unit[layer],
            layers.upper[layer],
            layers.lower[layer],
            klt.scale_values(),
            tables.transform,
            tables.to_raw,
            even,
            odd,
            layer,
            cache.num_layers,
            anchor,
            residual if residual is not None else anchor,
            refined,
            *klt.vector_bytes(cache.head_dim, code.anchor_bits),
        )


def compile_kernels(itemsize: int) -> None:
    """Compile or load what a cache of this element size needs (seconds when not cached)."""
    _encoder(itemsize)
    _decoder(itemsize)


def _for_lanes(table: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.repeat(table, LANES, axis=-1)


def _cos_sin(
    code: KltCode, first: int, tokens: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Tile by tile: float32 [tiles, pairs * LANES] each; the lanes of the last tile are filled."""
    tiles, pairs = -(-tokens // LANES), code.rotation.pairs
    cos, sin = (
        np.ascontiguousarray(table.reshape(pairs, tiles, LANES).swapaxes(0, 1)).reshape(
            tiles, pairs * LANES
        )
        for table in code.rotation.cos_sin(first, tiles * LANES)
    )
    return cos, sin


def _table(kind: types.Type, dimensions: int) -> types.Array:
    return types.Array(kind, dimensions, "C", readonly=True)


_F1, _F2, _F3 = (types.Array(types.float32, n, "C") for n in (1, 2, 3))
_U2 = types.Array(types.uint8, 2, "C")
_I = types.int64


@functools.cache
def _encoder(itemsize: int) -> Callable[..., None]:
    return compile_kernel(
        _encode,
        storage_type(itemsize),
        *PAGE_TYPES,
        *(_F2, _F2, types.boolean, _F3, _F2, _F2, _F2, _U2, _U2, _table(types.float32, 1)),
        *(_I, types.float32, _table(types.float32, 1), _table(types.uint16, 1)),
        *(_I, _I, WRITE_ROWS, WRITE_ROWS, _I, _I, _I),
    )


@functools.cache
def _decoder(itemsize: int) -> Callable[..., None]:
    table = _table(types.float32, 1)
    return compile_kernel(
        _decode,
        storage_type(itemsize),
        *PAGE_TYPES,
        *(_F2, _F2, types.boolean, _F3, _F2, _F2, _F1, _U2, _U2, table),
        *(_I, table, table, table),
        *(_I, _I, READ_ROWS, READ_ROWS, types.boolean, _I, _I, _I),
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
                    _turn(tile, cos[first // LANES], sin[first // LANES], is_neox, np.float32(-1))
                    _add(tile, mean[vector], np.float32(-1))
                    _multiply(analysis[head], tile, work)
                    _scaled(work, inverse_span[head], tile)
                    largest_magnitudes(bits, maximum)
                    _key_scales(maximum, scale_inverse, factor, scales)
                    _key_codes(work, factor, span[head], code)
                else:
                    _add(tile, mean[vector], np.float32(-1))
                    butterflies(tile, transform)
                    lane_scales(bits, norm, to_grid, maximum, factor, scales)
                    _value_codes(tile, factor, code9_of_grid, code)
                _pack(code, upper[vector], lower[vector], held, words)
                _put(packed, anchor, first, lanes, column * anchor_bytes, anchor_bytes)
                for w in range(lanes):
                    anchor[first + w, uint64(scale_column + column)] = scales[w]
                _pack(code, lower[vector], None, held, words)
                _put(packed, residual, first, lanes, rest_column, rest_bytes)


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
                _get(packed, anchor, first, lanes, column * anchor_bytes, anchor_bytes)
                _unpack(words, upper[vector], held, code)
                if refined:
                    _get(packed, residual, first, lanes, rest_column, rest_bytes)
                    _unpack(words, lower[vector], held, rest)
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
                    _multiply(synthesis[head], work, tile)
                    _spread(tile, factor, mean[vector])
                    _turn(tile, cos[first // LANES], sin[first // LANES], is_neox, np.float32(1))
                else:
                    for d in range(0, head_dim, 2):
                        for w in range(LANES):
                            i = uint64(d * LANES + w)
                            j = uint64(i + uint64(LANES))
                            tile[i] = even[code[i]] * factor[w]
                            tile[j] = odd[code[j]] * factor[w]
                    butterflies(tile, transform)
                    _add(tile, mean[vector], np.float32(1))
                store_tile(flat, kind, index, page, offset, lanes, bits)


@numba.njit(error_model="numpy")
def _turn(tile, cos, sin, is_neox, sign):
    """Rotate the pairs of every lane, or rotate them back; cos, sin: float32 [pairs * LANES]."""
    size = cos.size
    if is_neox:
        one, two = tile[:size], tile[size : 2 * size]
        for i in range(size):
            a, b = one[i], two[i]
            s = sin[i] * sign
            one[i] = a * cos[i] - b * s
            two[i] = b * cos[i] + a * s
    else:
        for pair in range(size // LANES):
            for w in range(LANES):
                at = uint64(2 * pair * LANES + w)
                j = uint64(at + uint64(LANES))
                c, s = cos[uint64(pair * LANES + w)], sin[uint64(pair * LANES + w)] * sign
                a, b = tile[at], tile[j]
                tile[at] = a * c - b * s
                tile[j] = b * c + a * s


# Loops over whole tiles, which the compiler turns into SIMD; of LANES steps it makes single ones.


@numba.njit(error_model="numpy")
def _add(tile, mean, sign):
    for i in range(tile.size):
        tile[i] = tile[i] + mean[i] * sign


@numba.njit(error_model="numpy")
def _scaled(x, factor, y):
    for i in range(y.size):
        y[i] = x[i] * factor[i]


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


@numba.njit(error_model="numpy", fastmath={"contract", "reassoc"})
def _multiply(matrix, x, y):
    """y = matrix @ x for every lane. Order and rounding are free: see `reference.py`.

    Four rows by four columns at a time: as many products as the registers take in one pass.
    """
    size = matrix.shape[0]
    for row in range(0, size, 4):
        i0 = row * LANES
        for w in range(4 * LANES):
            y[uint64(i0 + w)] = np.float32(0)
        for d in range(0, size, 4):
            a0, a1, a2, a3 = (
                matrix[row, d],
                matrix[row, d + 1],
                matrix[row, d + 2],
                matrix[row, d + 3],
            )
            b0, b1, b2, b3 = (
                matrix[row + 1, d],
                matrix[row + 1, d + 1],
                matrix[row + 1, d + 2],
                matrix[row + 1, d + 3],
            )
            c0, c1, c2, c3 = (
                matrix[row + 2, d],
                matrix[row + 2, d + 1],
                matrix[row + 2, d + 2],
                matrix[row + 2, d + 3],
            )
            e0, e1, e2, e3 = (
                matrix[row + 3, d],
                matrix[row + 3, d + 1],
                matrix[row + 3, d + 2],
                matrix[row + 3, d + 3],
            )
            j0 = d * LANES
            for w in range(LANES):
                x0 = x[uint64(j0 + w)]
                x1 = x[uint64(j0 + LANES + w)]
                x2 = x[uint64(j0 + 2 * LANES + w)]
                x3 = x[uint64(j0 + 3 * LANES + w)]
                y[uint64(i0 + w)] += a0 * x0 + a1 * x1 + a2 * x2 + a3 * x3
                y[uint64(i0 + LANES + w)] += b0 * x0 + b1 * x1 + b2 * x2 + b3 * x3
                y[uint64(i0 + 2 * LANES + w)] += c0 * x0 + c1 * x1 + c2 * x2 + c3 * x3
                y[uint64(i0 + 3 * LANES + w)] += e0 * x0 + e1 * x1 + e2 * x2 + e3 * x3


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


@numba.njit(error_model="numpy")
def _pack(code, width, shift, held, words):
    """Bits [shift, shift + width) of every code, as a string of words a lane.

    shift: None for zeros; held: scratch, uint64 [LANES]; words: uint32, lane-major.
    """
    pitch = words.size // LANES
    lanes = held.size  # not a constant: the compiler then makes a SIMD loop, not single steps
    held[:] = uint64(0)
    count = 0
    word = 0
    for d in range(width.size):
        bits = int(width[d])
        mask = uint32((1 << bits) - 1)
        down = uint32(0) if shift is None else uint32(shift[d])
        up = uint64(count)
        for w in range(lanes):
            field = (code[uint64(d * lanes + w)] >> down) & mask
            held[w] |= uint64(field) << up
        count += bits
        if count >= 32:
            for w in range(lanes):
                words[uint64(w * pitch + word)] = uint32(held[w] & uint64(0xFFFFFFFF))
                held[w] >>= uint64(32)
            word += 1
            count -= 32
    if count:
        for w in range(lanes):
            words[uint64(w * pitch + word)] = uint32(held[w] & uint64(0xFFFFFFFF))


@numba.njit(error_model="numpy")
def _unpack(words, width, held, code):
    """Inverse of `_pack` with the fields moved down to bit 0."""
    pitch = words.size // LANES
    lanes = held.size  # not a constant: the compiler then makes a SIMD loop, not single steps
    held[:] = uint64(0)
    count = 0
    word = 0
    for d in range(width.size):
        bits = int(width[d])
        if count < bits:
            up = uint64(count)
            for w in range(lanes):
                held[w] |= uint64(words[uint64(w * pitch + word)]) << up
            word += 1
            count += 32
        mask = uint64((1 << bits) - 1)
        down = uint64(bits)
        for w in range(lanes):
            code[uint64(d * lanes + w)] = uint32(held[w] & mask)
            held[w] >>= down
        count -= bits


@numba.njit(error_model="numpy")
def _put(packed, rows, first, lanes, column, count):
    """Bytes of the lanes' words (little-endian) to [column, column + count) of the rows."""
    pitch = packed.size // LANES
    for w in range(lanes):
        row = rows[first + w]
        for k in range(count):
            row[uint64(column + k)] = packed[uint64(w * pitch + k)]


@numba.njit(error_model="numpy")
def _get(packed, rows, first, lanes, column, count):
    """Inverse of `_put`. What lies behind the last byte is never looked at: widths add up."""
    pitch = packed.size // LANES
    for w in range(lanes):
        row = rows[first + w]
        for k in range(count):
            packed[uint64(w * pitch + k)] = row[uint64(column + k)]
