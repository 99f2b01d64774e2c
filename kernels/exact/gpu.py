# SPDX-License-Identifier: Apache-2.0
"""The exact tier's coder, Triton: equal to `reference.py` byte for byte.

A token's lanes are lanes of a warp, and a program takes as many tokens as fill one: a tile
[ROWS, LANES] of at most 32 rANS states. It walks its tokens' elements LANES at a time. Lanes that
write or read a word take their places from a prefix sum along the lanes, so that nothing is divided
between programs. What does not depend on the states (bits, expected error) is loaded one step
ahead. Everything is integer arithmetic.

The encoder walks backwards and fills a token's scratch row from its end; a second launch moves the
rows together. The decoder never reads outside its token's words, whatever they are: a word that is
missing counts as read, and a token that did not read exactly its words is refused.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from lynx_kernels.exact import code as exact_code
from lynx_kernels.exact.code import BIAS, MANTISSA, WIDTH, lanes_of
from lynx_kernels.shared.tiles_gpu import OPTIONS, device_table
from numpy.typing import NDArray

_WARP = 32
_PACK_WORDS = 2048

_STATE = tl.constexpr(1 << 16)
_LOWEST = tl.constexpr(exact_code.LOWEST)
_SPLIT = tl.constexpr(exact_code.SPLIT)
_SPLIT_ROW = tl.constexpr((exact_code.SPLIT - exact_code.LOWEST) // 2)
_MAGNITUDE_ROW = tl.constexpr(exact_code.MAGNITUDE_ROW)
_MAGNITUDE_ROWS = tl.constexpr(len(exact_code.exact_code().low) - exact_code.MAGNITUDE_ROW)
_PRECISION = tl.constexpr(exact_code.PRECISION)
_FREE = tl.constexpr(32 - exact_code.PRECISION)
_LAST_SLOT = tl.constexpr(exact_code.SLOTS - 1)
_SYMBOL_RAW = tl.constexpr(exact_code.SYMBOL_RAW)
_SYMBOLS = tl.constexpr(exact_code.MAX_SYMBOLS)
_BINADE_CELLS = tl.constexpr(exact_code.BINADE_CELLS)
_BELOW = tl.constexpr(exact_code.BELOW)
_CELLS = tl.constexpr(exact_code.CELLS)


def encode(
    true: torch.Tensor,
    coarse: torch.Tensor,
    spread: torch.Tensor,
    tilt: torch.Tensor,
    kind: int,
    header: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens one after the other (uint8 [n]), each behind `header` bytes of zero, and their
    lengths (int64 [T]), on the device.

    true, coarse: uint16 or uint32 [T, V * D]; spread: int16 [T, V] and tilt: int16 [V, D], whose
    sum is the expected error in 1/8 octaves; header: even. All on one device and C-contiguous.
    Waits for the device, since the size of the result depends on the values.
    """
    tokens, elements = true.shape
    room = 2 * lanes_of(elements) + elements * (2 if WIDTH[kind] == 16 else 3)
    scratch = torch.empty((tokens, room), dtype=torch.uint16, device=true.device)
    sizes = torch.zeros(tokens, dtype=torch.int64, device=true.device)
    if not tokens:
        return scratch.view(torch.uint8).flatten(), sizes
    intervals, rows = _tables()
    arguments = _arguments(coarse, spread, tilt, kind)
    _encode[_grid(tokens, elements)](
        true=true,
        **arguments,
        intervals=device_table(intervals, true.device),
        rows=device_table(rows, true.device),
        scratch=scratch,
        room=room,
        sizes=sizes,
        header=header // 2,
    )
    ends = sizes.cumsum(0)
    longest, total = torch.stack((sizes.max(), ends[-1])).tolist()
    packed = torch.empty(total, dtype=torch.uint16, device=true.device)
    _pack[tokens, triton.cdiv(longest, _PACK_WORDS)](
        scratch=scratch,
        room=room,
        sizes=sizes,
        ends=ends,
        header=header // 2,
        packed=packed,
        WORDS=_PACK_WORDS,
        **OPTIONS,
    )
    return packed.view(torch.uint8), 2 * sizes


def decode(
    data: torch.Tensor,
    lengths: NDArray[np.uint32],
    coarse: torch.Tensor,
    spread: torch.Tensor,
    tilt: torch.Tensor,
    kind: int,
    header: int,
) -> torch.Tensor:
    """Bits of the true values, [T, V * D] like `coarse`; arguments as in `encode`, but the lengths
    in host memory and `header` bytes skipped. `data` begins at a multiple of 2 bytes.

    Raises ValueError for bytes that nothing is encoded to; waits for the device to know.
    """
    tokens, elements = coarse.shape
    lanes = lanes_of(elements)
    if int(lengths.sum(dtype=np.uint64)) != len(data):
        raise ValueError("lengths do not add up to the bytes")
    if (lengths < header + 4 * lanes).any() or (lengths % 2).any():
        raise ValueError("a token's bytes are too few or odd")
    true = torch.empty_like(coarse)
    if not tokens:
        return true
    ends = torch.from_numpy(np.cumsum(lengths // 2, dtype=np.int64)).to(coarse.device)
    sizes = torch.from_numpy((lengths // 2 - header // 2).astype(np.int64)).to(coarse.device)
    good = torch.zeros(tokens, dtype=torch.int32, device=coarse.device)
    _decode[_grid(tokens, elements)](
        data=data.view(torch.uint16),
        ends=ends,
        sizes=sizes,
        **_arguments(coarse, spread, tilt, kind),
        slots=device_table(exact_code.exact_code().slot, coarse.device),
        rows=device_table(_tables()[1], coarse.device),
        true=true,
        good=good,
    )
    if not good.all():
        raise ValueError("a token's bytes do not end with its last element")
    return true


@functools.cache
def _tables() -> tuple[NDArray[np.uint32], NDArray[np.int32]]:
    """By row and symbol, start << 16 | frequency; by row, low << 16 | escape."""
    code = exact_code.exact_code()
    return code.start << np.uint32(16) | code.frequency, code.low << np.int32(16) | code.escape


def _grid(tokens: int, elements: int) -> tuple[int]:
    return (triton.cdiv(tokens, _WARP // lanes_of(elements)),)


def _arguments(
    coarse: torch.Tensor, spread: torch.Tensor, tilt: torch.Tensor, kind: int
) -> dict[str, Any]:
    tokens, elements = coarse.shape
    lanes = lanes_of(elements)
    return OPTIONS | {
        "num_warps": 1,
        "coarse": coarse,
        "spread": spread,
        "tilt": tilt,
        "num_tokens": tokens,
        "elements": elements,
        "HEAD_DIM": tilt.shape[1],
        "MANTISSA": MANTISSA[kind],
        "BIAS": BIAS[kind],
        "WIDTH": WIDTH[kind],
        "LANES": lanes,
        "ROWS": _WARP // lanes,
    }


@triton.jit
def _tile(num_tokens, LANES: tl.constexpr, ROWS: tl.constexpr):
    """Tokens int64 [ROWS, 1], which of them exist, and lanes int32 [1, LANES]."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    return token.to(tl.int64), token < num_tokens, tl.arange(0, LANES)[None, :]


@triton.jit
def _expected(coarse, spread, tilt, token, valid, i, elements, HEAD_DIM: tl.constexpr):
    """The reconstruction's bits (uint32) and sigma (int32) of elements i [1, LANES]."""
    inside = (i >= 0) & (i < elements)
    there = valid & inside
    bits = tl.load(coarse + token * elements + i, mask=there, other=0).to(tl.uint32)
    vector = token * (elements // HEAD_DIM) + i // HEAD_DIM
    sigma = tl.load(spread + vector, mask=there, other=0).to(tl.int32)
    return bits, sigma + tl.load(tilt + i, mask=inside, other=0).to(tl.int32)


@triton.jit
def _plan(bits, sigma, MANTISSA: tl.constexpr, BIAS: tl.constexpr, WIDTH: tl.constexpr):
    """Table and raw bits, int32: `exact_code.plans`, computed instead of looked up."""
    magnitude = bits & ((1 << (WIDTH - 1)) - 1)
    exponent = tl.maximum((magnitude >> MANTISSA).to(tl.int32), 1)
    b = tl.maximum(sigma - 8 * (exponent - (BIAS + MANTISSA)), _LOWEST)
    b = tl.minimum(b, 8 * (MANTISSA - 1 + _MAGNITUDE_ROWS) - 1)
    row = tl.where(b < _SPLIT, (b - _LOWEST) >> 1, (((b - _SPLIT) & 7) >> 1) + _SPLIT_ROW)
    wide = (b >> 3) - (MANTISSA - 1)
    row = tl.where(wide < 0, row, wide + _MAGNITUDE_ROW)
    raw = tl.minimum(tl.maximum(((b - _SPLIT) >> 3) + 1, 0), MANTISSA - 3)
    return row, raw


@triton.jit
def _ordered(bits, WIDTH: tl.constexpr):
    """Bits of floats as integers of the same order, in the lowest WIDTH bits."""
    top: tl.constexpr = 1 << (WIDTH - 1)
    return tl.where((bits & top) != 0, ~bits, bits | top)


@triton.jit
def _unordered(ordered, WIDTH: tl.constexpr):
    top: tl.constexpr = 1 << (WIDTH - 1)
    return tl.where((ordered & top) != 0, ordered ^ top, ~ordered)


@triton.jit
def _put(words, place, state, need, valid):
    """Write the lower 16 bits of the states in need before `place`, in their lanes' order.

    words: pointers [ROWS, 1]; place: int32 [ROWS, 1]. Returns the new place.
    """
    one = need.to(tl.int32)
    count = tl.sum(one, 1, keep_dims=True)
    at = place - count + tl.cumsum(one, 1) - one
    tl.store(words + at, state.to(tl.uint16), mask=need & valid)
    return place - count


@triton.jit
def _take(words, size, place, state, need):
    """Refill the states in need by the words from `place` on; also the new place."""
    one = need.to(tl.int32)
    at = place + tl.cumsum(one, 1) - one
    word = tl.load(words + at, mask=need & (at < size), other=0).to(tl.uint32)
    state = tl.where(need, (state << 16) | word, state)
    return state, place + tl.sum(one, 1, keep_dims=True)


@triton.jit(do_not_specialize=["num_tokens"])
def _encode(
    true,
    coarse,
    spread,
    tilt,
    num_tokens,
    elements,
    intervals,
    rows,
    scratch,
    room,
    sizes,
    header,
    HEAD_DIM: tl.constexpr,
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
):
    top: tl.constexpr = 1 << (WIDTH - 1)
    token, valid, lane = _tile(num_tokens, LANES, ROWS)
    words = scratch + token * room
    place = tl.zeros((ROWS, 1), tl.int32) + room
    state = tl.full((ROWS, LANES), _STATE, tl.uint32)
    i = elements - LANES + lane
    next_bits = tl.load(true + token * elements + i, mask=valid, other=0).to(tl.uint32)
    next_coarse, next_sigma = _expected(coarse, spread, tilt, token, valid, i, elements, HEAD_DIM)
    for _ in range(elements // LANES):
        bits, c, sigma = next_bits, next_coarse, next_sigma
        i -= LANES
        there = valid & (i >= 0)
        next_bits = tl.load(true + token * elements + i, mask=there, other=0).to(tl.uint32)
        next_coarse, next_sigma = _expected(
            coarse, spread, tilt, token, valid, i, elements, HEAD_DIM
        )

        row, raw = _plan(c, sigma, MANTISSA, BIAS, WIDTH)
        about = tl.load(rows + row)
        escape = about & 0xFFFF
        difference = (_ordered(bits, WIDTH) - _ordered(c, WIDTH)).to(tl.int32, bitcast=True)
        difference = (difference << (32 - WIDTH)) >> (32 - WIDTH)
        magnitude = bits & (top - 1)
        cell = (magnitude >> raw.to(tl.uint32)).to(tl.int32)
        cell -= sigma + (_BINADE_CELLS * BIAS - _BELOW)
        other = tl.where(((bits ^ c) & top) != 0, _CELLS, 0)
        wide = row >= _MAGNITUDE_ROW
        symbol = tl.where(wide, cell, (difference >> raw) - (about >> 16))
        escaped = (symbol < 0) | (symbol >= tl.where(wide, _CELLS, escape))
        symbol = tl.where(escaped, escape, tl.where(wide, symbol + other, symbol))
        interval = tl.load(intervals + row * _SYMBOLS + symbol)
        low = tl.where(wide, magnitude, difference.to(tl.uint32, bitcast=True))

        raw = raw.to(tl.uint32)
        near = tl.minimum(raw, _SYMBOL_RAW)
        low = low & ((1 << raw) - 1)
        upper = tl.where(escaped, 0, low >> (raw - near))
        far = tl.where(escaped, 16, raw - near)
        if tl.max(far.to(tl.int32)) > 0:
            if WIDTH == 32:
                place = _put(words, place, state, escaped, valid)
                state = tl.where(escaped, (state & 0xFFFF0000) | (bits >> 16), state)
            full = (state >> (31 - far)) > 1
            place = _put(words, place, state, full, valid)
            state = tl.where(full, state >> 16, state)
            rest = tl.where(escaped, bits, low) & ((1 << far) - 1)
            state = (state << far) | rest
        frequency = interval & 0xFFFF
        full = state >= ((frequency << _FREE) >> near)
        place = _put(words, place, state, full, valid)
        state = tl.where(full, state >> 16, state)
        quotient = state // frequency
        slot = state - quotient * frequency + (interval >> 16)
        state = (quotient << (near + _PRECISION)) | (slot << near) | upper
    place -= 2 * LANES
    tl.store(words + place + 2 * lane, state.to(tl.uint16), mask=valid)
    tl.store(words + place + 2 * lane + 1, (state >> 16).to(tl.uint16), mask=valid)
    tl.store(sizes + token, (room - place + header).to(tl.int64), mask=valid)


@triton.jit
def _pack(scratch, room, sizes, ends, header, packed, WORDS: tl.constexpr):
    """Move a token's words from the end of its scratch row to where the token before it ends."""
    token = tl.program_id(0).to(tl.int64)
    size, end = tl.load(sizes + token), tl.load(ends + token)
    i = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    source = scratch + ((token + 1) * room - size)
    word = tl.load(source + i, mask=(i >= header) & (i < size), other=0)
    tl.store(packed + (end - size) + i, word, mask=i < size)


@triton.jit(do_not_specialize=["num_tokens"])
def _decode(
    data,
    ends,
    sizes,
    coarse,
    spread,
    tilt,
    num_tokens,
    elements,
    slots,
    rows,
    true,
    good,
    HEAD_DIM: tl.constexpr,
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
):
    top: tl.constexpr = 1 << (WIDTH - 1)
    token, valid, lane = _tile(num_tokens, LANES, ROWS)
    size = tl.load(sizes + token, mask=valid, other=0)
    words = data + (tl.load(ends + token, mask=valid, other=0) - size)
    size = size.to(tl.int32)
    state = tl.load(words + 2 * lane, mask=valid, other=0).to(tl.uint32)
    state |= tl.load(words + 2 * lane + 1, mask=valid, other=0).to(tl.uint32) << 16
    place = tl.full((ROWS, 1), 2 * LANES, tl.int32)
    i = tl.zeros((1, LANES), tl.int32) + lane
    next_coarse, next_sigma = _expected(coarse, spread, tilt, token, valid, i, elements, HEAD_DIM)
    for _ in range(elements // LANES):
        c, sigma = next_coarse, next_sigma
        next_coarse, next_sigma = _expected(
            coarse, spread, tilt, token, valid, i + LANES, elements, HEAD_DIM
        )

        row, raw_bits = _plan(c, sigma, MANTISSA, BIAS, WIDTH)
        about = tl.load(rows + row)
        raw = raw_bits.to(tl.uint32)
        near = tl.minimum(raw, _SYMBOL_RAW)
        low = state & ((1 << near) - 1)
        state = state >> near
        slot = (state & _LAST_SLOT).to(tl.int32)
        entry = tl.load(slots + (row << _PRECISION) + slot)
        state = (entry >> 20) * (state >> _PRECISION) + ((entry >> 8) & 0xFFF)
        state, place = _take(words, size, place, state, state < _STATE)
        symbol = (entry & 0xFF).to(tl.int32)
        escaped = symbol == (about & 0xFFFF)
        far = tl.where(escaped, 16, raw - near)
        if tl.max(far.to(tl.int32)) > 0:
            rest = state & ((1 << far) - 1)
            state = state >> far
            state, place = _take(words, size, place, state, (far > 0) & (state < _STATE))
            low = tl.where(escaped, rest, (low << far) | rest)
            if WIDTH == 32:
                low = tl.where(escaped, ((state & 0xFFFF) << 16) | low, low)
                state = tl.where(escaped, state >> 16, state)
                state, place = _take(words, size, place, state, escaped & (state < _STATE))

        step = (symbol + (about >> 16)).to(tl.uint32, bitcast=True)
        near_bits = _unordered(_ordered(c, WIDTH) + (step << raw) + low, WIDTH)
        other = symbol >= _CELLS
        cell = symbol + sigma + (_BINADE_CELLS * BIAS - _BELOW) - tl.where(other, _CELLS, 0)
        magnitude = ((cell.to(tl.uint32, bitcast=True) << raw) + low) & (top - 1)
        sign = (c & top) ^ tl.where(other, top, 0).to(tl.uint32)
        bits = tl.where(row >= _MAGNITUDE_ROW, magnitude | sign, near_bits)
        bits = tl.where(escaped, low, bits)
        tl.store(true + token * elements + i, bits.to(true.dtype.element_ty), mask=valid)
        i += LANES
    wrong = tl.sum((state != _STATE).to(tl.int32), 1, keep_dims=True)
    tl.store(good + token, ((wrong == 0) & (place == size)).to(tl.int32), mask=valid)
