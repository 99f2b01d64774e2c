# SPDX-License-Identifier: Apache-2.0
"""Codes of varying widths as bytes of a row, sixteen tokens side by side."""

from __future__ import annotations

import numba
from lynx_kernels.shared.tiles_cpu import LANES
from numpy import uint32, uint64


@numba.njit(error_model="numpy")
def pack(code, width, shift, held, words):
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
def unpack(words, width, held, code):
    """Inverse of `pack` with the fields moved down to bit 0."""
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
def put(packed, rows, first, lanes, column, count):
    """Bytes of the lanes' words (little-endian) to [column, column + count) of the rows."""
    pitch = packed.size // LANES
    for w in range(lanes):
        row = rows[first + w]
        for k in range(count):
            row[uint64(column + k)] = packed[uint64(w * pitch + k)]


@numba.njit(error_model="numpy")
def get(packed, rows, first, lanes, column, count):
    """Inverse of `put`. What lies behind the last byte is never looked at: widths add up."""
    pitch = packed.size // LANES
    for w in range(lanes):
        row = rows[first + w]
        for k in range(count):
            packed[uint64(w * pitch + k)] = row[uint64(column + k)]
