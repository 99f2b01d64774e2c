# SPDX-License-Identifier: Apache-2.0
"""The exact tier's coder, numba: one token after another, equal to `reference.py` byte for byte."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from lynx_kernels.exact.code import (
    BELOW,
    BIAS,
    BINADE_CELLS,
    CELLS,
    LOWEST,
    MAGNITUDE_ROW,
    MANTISSA,
    PRECISION,
    SLOTS,
    SYMBOL_RAW,
    WIDTH,
    exact_code,
    lanes_of,
    plans,
)
from lynx_kernels.shared.tiles_cpu import compile_kernel
from numba import types
from numpy import int32, uint16, uint32, uint64
from numpy.typing import NDArray

_STATE = uint32(1 << 16)
_WORD = uint32(0xFFFF)
MAX_LANES = 32


def encode(
    true: NDArray,
    coarse: NDArray,
    spread: NDArray[np.int16],
    tilt: NDArray[np.int16],
    kind: int,
    header: int,
) -> tuple[NDArray[np.uint8], NDArray[np.uint32]]:
    """Tokens one after the other (uint8 [n]), each behind `header` bytes of zero, and their
    lengths (uint32 [T]).

    true, coarse: uint16 or uint32 [T, V * D], C-contiguous; spread: int16 [T, V] and tilt: int16
    [V, D], whose sum is the expected error in 1/8 octaves; header: even.
    """
    tokens, elements = true.shape
    lanes = lanes_of(elements)
    longest = header // 2 + 2 * lanes + elements * (2 if WIDTH[kind] == 16 else 3)
    out = np.empty(tokens * longest, np.uint16)  # pages that nothing is written to cost nothing
    lengths = np.empty(tokens, np.uint32)
    code = exact_code()
    size = _encoder(WIDTH[kind])(
        true, coarse, spread, tilt, lanes, *_constants(kind), plans(kind),
        code.start, code.frequency, code.low, code.escape, header // 2, out, lengths,
    )  # fmt: skip
    return out[:size].copy().view(np.uint8), lengths


def decode(
    data: NDArray[np.uint8],
    lengths: NDArray[np.uint32],
    coarse: NDArray,
    spread: NDArray[np.int16],
    tilt: NDArray[np.int16],
    kind: int,
    header: int,
) -> NDArray:
    """Bits of the true values, [T, V * D]; arguments as in `encode`, `header` bytes skipped.

    Raises ValueError for bytes that nothing is encoded to.
    """
    lanes = lanes_of(coarse.shape[1])
    if int(lengths.sum(dtype=np.uint64)) != len(data):
        raise ValueError("lengths do not add up to the bytes")
    if (lengths < header + 4 * lanes).any() or (lengths % 2).any():
        raise ValueError("a token's bytes are too few or odd")
    words = np.concatenate([data, np.zeros(2 * 3 * MAX_LANES, np.uint8)]).view(np.uint16)
    true = np.empty_like(coarse)
    code = exact_code()
    good = _decoder(WIDTH[kind])(
        words, lengths, coarse, spread, tilt, lanes, *_constants(kind), plans(kind),
        code.slot, code.low, code.escape, header // 2, true,
    )  # fmt: skip
    if not good:
        raise ValueError("a token's bytes do not end with its last element")
    return true


def _constants(kind: int) -> tuple[int, int]:
    return MANTISSA[kind], BIAS[kind]


_INTEGER = types.int64
_SPREAD = types.Array(types.int16, 2, "C", readonly=True)
_TABLE = types.Array(types.uint32, 2, "C", readonly=True)
_ROWS = types.Array(types.int32, 1, "C", readonly=True)
_PLANS = types.Array(types.uint16, 1, "C", readonly=True)


@functools.cache
def _encoder(width: int) -> Callable[..., int]:
    bits = types.Array(types.uint16 if width == 16 else types.uint32, 2, "C", readonly=True)
    words, lengths = types.Array(types.uint16, 1, "C"), types.Array(types.uint32, 1, "C")
    return compile_kernel(
        _encode, bits, bits, _SPREAD, _SPREAD, *(_INTEGER,) * 3, _PLANS, _TABLE, _TABLE,
        _ROWS, _ROWS, _INTEGER, words, lengths, result=_INTEGER,
    )  # fmt: skip


@functools.cache
def _decoder(width: int) -> Callable[..., bool]:
    kind = types.uint16 if width == 16 else types.uint32
    bits = types.Array(kind, 2, "C", readonly=True)
    return compile_kernel(
        _decode, types.Array(types.uint16, 1, "C", readonly=True),
        types.Array(types.uint32, 1, "C", readonly=True), bits, _SPREAD, _SPREAD,
        *(_INTEGER,) * 3, _PLANS, _TABLE, _ROWS, _ROWS, _INTEGER, types.Array(kind, 2, "C"),
        result=types.boolean,
    )  # fmt: skip


def _encode(
    true,
    coarse,
    spread,
    tilt,
    lanes,
    mantissa,
    bias,
    plan_of,
    start_of,
    frequency_of,
    low_of,
    escape_of,
    header,
    out,
    lengths,
):
    elements = true.shape[1]
    head_dim = tilt.shape[1]
    wide = true.itemsize == 4
    top = uint32(1) << uint32(8 * true.itemsize - 1)
    mask = uint32(top - uint32(1))
    interval = np.empty(elements, uint32)  # start << 16 | frequency - 1
    low_bits = np.empty(elements, uint32)  # raw bits, or the true value after an escape
    counts = np.empty(elements, np.uint8)  # raw bits; 255 after an escape with near raw bits below
    nears = np.empty(elements, np.uint8)
    scratch = np.empty(3 * elements, uint16)
    state = np.empty(MAX_LANES, uint32)
    size = 0
    for token in range(true.shape[0]):
        for vector in range(tilt.shape[0]):
            expected = int32(spread[token, vector])
            for j in range(head_dim):
                i = uint64(vector * head_dim + j)
                t = uint32(true[token, i])
                c = uint32(coarse[token, i])
                sigma = int32(expected + int32(tilt[vector, j]))
                exponent = max(int32((c & mask) >> uint32(mantissa)), int32(1))
                b = int32(sigma - int32(8) * (exponent - int32(bias + mantissa)) - int32(LOWEST))
                plan = plan_of[uint64(min(max(b, int32(0)), int32(plan_of.size - 1)))]
                row = uint64(plan & uint16(0xFF))
                raw = uint32(plan >> uint16(8))
                if row < uint64(MAGNITUDE_ROW):
                    ot = uint32(~t) if t & top else uint32(t | top)
                    oc = uint32(~c) if c & top else uint32(c | top)
                    difference = int32(ot - oc)
                    if not wide:
                        difference = int32(np.int16(difference))
                    symbol = int32((difference >> int32(raw)) - low_of[row])
                    escaped = symbol < int32(0) or symbol >= escape_of[row]
                    bits = uint32(difference)
                else:
                    bits = uint32(t & mask)
                    symbol = int32(int32(bits >> raw) - sigma - int32(BINADE_CELLS * bias - BELOW))
                    escaped = symbol < int32(0) or symbol >= int32(CELLS)
                    if (t ^ c) & top:
                        symbol += int32(CELLS)
                near = min(raw, uint32(SYMBOL_RAW))
                if escaped:
                    symbol = escape_of[row]
                    low_bits[i] = t
                    counts[i] = uint32(255)
                else:
                    low_bits[i] = bits & uint32((uint32(1) << raw) - uint32(1))
                    counts[i] = uint32(raw - near)
                nears[i] = near
                s = uint64(symbol)
                interval[i] = (start_of[row, s] << uint32(16)) | frequency_of[row, s]
        for lane in range(lanes):
            state[lane] = _STATE
        place = scratch.size
        for first in range(elements - lanes, -1, -lanes):
            if wide:
                for lane in range(lanes - 1, -1, -1):
                    i = uint64(first + lane)
                    if counts[i] == 255:
                        x = state[lane]
                        place -= 1
                        scratch[uint64(place)] = uint16(x & _WORD)
                        state[lane] = (x & ~_WORD) | (low_bits[i] >> uint32(16))
            for lane in range(lanes - 1, -1, -1):
                i = uint64(first + lane)
                far = uint32(counts[i])
                if far:
                    far = min(far, uint32(16))
                    x = state[lane]
                    if (x >> uint32(uint32(31) - far)) >> uint32(1):
                        place -= 1
                        scratch[uint64(place)] = uint16(x & _WORD)
                        x >>= uint32(16)
                    rest = low_bits[i] & uint32((uint32(1) << far) - uint32(1))
                    state[lane] = (x << far) | rest
            for lane in range(lanes - 1, -1, -1):
                i = uint64(first + lane)
                pair = interval[i]
                frequency = pair & _WORD
                near = uint32(nears[i])
                count = uint32(counts[i])
                upper = low_bits[i] >> count if count < uint32(32) else uint32(0)
                x = state[lane]
                full = x >= (frequency << uint32(uint32(32 - PRECISION) - near))
                scratch[uint64(place - 1)] = uint16(x & _WORD)
                place -= int(full)
                x = uint32(x >> uint32(16)) if full else x
                quotient = uint32(x // frequency)
                slot = uint32(x - quotient * frequency + (pair >> uint32(16)))
                x = (quotient << uint32(uint32(PRECISION) + near)) | (slot << near) | upper
                state[lane] = x
        begin = size
        for _ in range(header):
            out[uint64(size)] = uint16(0)
            size += 1
        for lane in range(lanes):
            out[uint64(size)] = uint16(state[lane] & _WORD)
            out[uint64(size + 1)] = uint16(state[lane] >> uint32(16))
            size += 2
        for used in range(place, scratch.size):
            out[uint64(size)] = scratch[uint64(used)]
            size += 1
        lengths[token] = uint32(2 * (size - begin))
    return size


def _decode(
    words,
    lengths,
    coarse,
    spread,
    tilt,
    lanes,
    mantissa,
    bias,
    plan_of,
    slot_of,
    low_of,
    escape_of,
    header,
    true,
):
    elements = coarse.shape[1]
    head_dim = tilt.shape[1]
    wide = coarse.itemsize == 4
    top = uint32(1) << uint32(8 * coarse.itemsize - 1)
    mask = uint32(top - uint32(1))
    planned = np.empty(elements, uint16)
    symbols = np.empty(elements, np.uint8)
    low_bits = np.empty(elements, uint32)
    gone = np.empty(elements, np.uint8)
    state = np.empty(MAX_LANES, uint32)
    slots = slot_of.reshape(slot_of.size)
    end = 0
    for token in range(coarse.shape[0]):
        position = end + header
        end += int(lengths[token]) // 2
        for vector in range(tilt.shape[0]):
            expected = int32(spread[token, vector])
            for j in range(head_dim):
                i = uint64(vector * head_dim + j)
                c = uint32(coarse[token, i])
                sigma = int32(expected + int32(tilt[vector, j]))
                exponent = max(int32((c & mask) >> uint32(mantissa)), int32(1))
                b = int32(sigma - int32(8) * (exponent - int32(bias + mantissa)) - int32(LOWEST))
                planned[i] = plan_of[uint64(min(max(b, int32(0)), int32(plan_of.size - 1)))]
        for lane in range(lanes):
            low, high = words[uint64(position)], words[uint64(position + 1)]
            state[lane] = uint32(low) | (uint32(high) << uint32(16))
            position += 2
        for first in range(0, elements, lanes):
            special = uint32(0)
            for lane in range(lanes):
                i = uint64(first + lane)
                plan = uint32(planned[i])
                row = plan & uint32(0xFF)
                raw = plan >> uint32(8)
                near = min(raw, uint32(SYMBOL_RAW))
                x = state[lane]
                upper = x & uint32((uint32(1) << near) - uint32(1))
                x >>= near
                entry = slots[uint64((row << uint32(PRECISION)) | (x & uint32(SLOTS - 1)))]
                x = (entry >> uint32(20)) * (x >> uint32(PRECISION)) + (
                    (entry >> uint32(8)) & uint32(0xFFF)
                )
                empty = x < _STATE
                refilled = uint32((x << uint32(16)) | uint32(words[uint64(position)]))
                position += int(empty)
                state[lane] = refilled if empty else x
                symbol = entry & uint32(0xFF)
                symbols[i] = symbol
                low_bits[i] = upper
                escaped = uint32(symbol == uint32(escape_of[uint64(row)]))
                gone[i] = escaped
                special |= escaped | uint32(raw - near)
            if special:
                for lane in range(lanes):
                    i = uint64(first + lane)
                    raw = uint32(planned[i] >> uint16(8))
                    far = uint32(raw - min(raw, uint32(SYMBOL_RAW)))
                    x = state[lane]
                    if gone[i]:
                        low_bits[i] = x & _WORD
                        far = uint32(16)
                    elif far:
                        rest = x & uint32((uint32(1) << far) - uint32(1))
                        low_bits[i] = (low_bits[i] << far) | rest
                    x >>= far
                    if far and x < _STATE:
                        x = (x << uint32(16)) | uint32(words[uint64(position)])
                        position += 1
                    state[lane] = x
                if wide:
                    for lane in range(lanes):
                        i = uint64(first + lane)
                        if gone[i]:
                            x = state[lane]
                            low_bits[i] |= (x & _WORD) << uint32(16)
                            x >>= uint32(16)
                            if x < _STATE:
                                x = (x << uint32(16)) | uint32(words[uint64(position)])
                                position += 1
                            state[lane] = x
            if position > end:  # reads up to here are covered by what follows the last token
                return False
        if position != end:
            return False
        for lane in range(lanes):
            if state[lane] != _STATE:
                return False
        for vector in range(tilt.shape[0]):
            expected = int32(spread[token, vector])
            for j in range(head_dim):
                i = uint64(vector * head_dim + j)
                table = uint64(planned[i] & uint16(0xFF))
                raw = uint32(planned[i] >> uint16(8))
                c = uint32(coarse[token, i])
                bits = low_bits[i]
                if gone[i]:
                    t = bits
                elif table < uint64(MAGNITUDE_ROW):
                    oc = uint32(~c) if c & top else uint32(c | top)
                    step = uint32(int32(symbols[i]) + low_of[table])
                    ordered = uint32(uint32(oc + (step << raw)) + bits)
                    t = uint32(ordered ^ top) if ordered & top else uint32(~ordered)
                else:
                    sigma = int32(expected + int32(tilt[vector, j]))
                    symbol = int32(symbols[i])
                    other = symbol >= int32(CELLS)
                    cell = int32(symbol + sigma + int32(BINADE_CELLS * bias - BELOW))
                    sign = c & top
                    if other:
                        cell -= int32(CELLS)
                        sign ^= top
                    t = uint32(uint32(uint32(uint32(cell) << raw) + bits) & mask) | sign
                true[token, i] = t
    return True
