# SPDX-License-Identifier: Apache-2.0
"""The exact tier's coder, numpy reference: all tokens and lanes at once, one element a step.

A token of E elements is coded by L lanes (`exact_code.lanes_of`), element i by lane i % L in step
i // L. Each lane is a rANS coder with a state of 32 bits that is refilled by words of 16; all lanes
share one stream of words. In a step every lane does at most three things, each for all lanes before
the next, and the lanes that need a word take them in order:

A. symbol and up to 4 raw bits, as one symbol of 12 to 16 bits of precision;
B. further raw bits: those of the difference, or 16 bits of the true value after an escape;
C. after an escape in a cache of 32 bits, the upper 16 bits.

A token's bytes: the states (uint32 [L]), then the words (uint16), in the decoder's order. The
encoder runs backwards. A decoder that ends with all states at 2^16 and no word left has decoded
what was encoded.
"""

from __future__ import annotations

from typing import NamedTuple

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
from numpy.typing import NDArray

STATE = 1 << 16
Integers = NDArray[np.int64]


class _Plan(NamedTuple):
    """What both sides know of each element, int64 [T, E] each: table, raw bits, sigma's cell."""

    row: Integers
    raw: Integers
    cell: Integers
    coarse: Integers


def encode(
    true: NDArray, coarse: NDArray, sigma: NDArray[np.int16], kind: int
) -> list[NDArray[np.uint8]]:
    """Bytes of each token.

    true, coarse: bits of the values, uint16 or uint32 [T, E]; sigma: int16 [T, E], expected error
    in 1/8 octaves; kind: as in `tiles_cpu`.
    """
    code, plan = exact_code(), _plan(coarse, sigma, kind)
    symbol, raw, escaped = _symbols(true.astype(np.int64), plan, kind)
    near = np.minimum(plan.raw, SYMBOL_RAW)
    far = plan.raw - near
    lanes = lanes_of(true.shape[1])
    state = np.full((len(true), lanes), STATE, np.int64)
    taken: list[tuple[Integers, NDArray[np.bool_]]] = []

    def push(part: Integers, start: Integers, frequency: Integers, total: Integers) -> None:
        """Code `part` low bits under an interval of 2^total, in the lanes with a frequency."""
        nonlocal state
        full = (frequency > 0) & (state >= frequency << (32 - total))
        taken.append((state & 0xFFFF, full))
        state = np.where(full, state >> 16, state)
        quotient, rest = np.divmod(state, np.maximum(frequency, 1))
        state = np.where(frequency > 0, (quotient << total) + rest * part + start, state)

    zero = np.zeros_like(state)
    for first in range(true.shape[1] - lanes, -1, -lanes):
        here = np.s_[:, first : first + lanes]
        row, s, bits, gone = plan.row[here], symbol[here], raw[here], escaped[here]
        word = true[here].astype(np.int64)
        if WIDTH[kind] == 32:
            push(zero + 1, word >> 16, gone.astype(np.int64), zero + 16)
        more = np.where(gone, 16, far[here])
        rest = np.where(gone, word & 0xFFFF, bits & ((1 << more) - 1))
        push(zero + 1, rest, (more > 0).astype(np.int64), more)
        upper = np.where(gone, 0, bits >> far[here])
        start = code.start[row, s].astype(np.int64) << near[here]
        frequency = code.frequency[row, s].astype(np.int64)
        push(1 << near[here], start + upper, frequency, PRECISION + near[here])
    words, used = (np.stack(part[::-1], axis=1) for part in zip(*taken, strict=True))
    tokens = []
    for index, last in enumerate(state):
        stream = words[index][used[index]].astype("<u2")
        tokens.append(np.concatenate([last.astype("<u4").view(np.uint8), stream.view(np.uint8)]))
    return tokens


def decode(
    tokens: list[NDArray[np.uint8]], coarse: NDArray, sigma: NDArray[np.int16], kind: int
) -> NDArray:
    """Bits of the true values, [T, E]. Raises ValueError for bytes that nothing is encoded to."""
    code, plan = exact_code(), _plan(coarse, sigma, kind)
    elements = coarse.shape[1]
    lanes = lanes_of(elements)
    if any(len(token) < 4 * lanes or len(token) % 2 for token in tokens):
        raise ValueError("a token's bytes are too few or odd")
    sizes = np.array([(len(token) - 4 * lanes) // 2 for token in tokens], np.int64)
    room = int(sizes.max(initial=0)) + lanes
    words = np.zeros((len(tokens), room), np.int64)
    state = np.zeros((len(tokens), lanes), np.int64)
    for index, token in enumerate(tokens):
        state[index] = token[: 4 * lanes].copy().view("<u4")
        words[index, : sizes[index]] = token[4 * lanes :].copy().view("<u2")
    position = np.zeros(len(tokens), np.int64)
    true = np.zeros(coarse.shape, np.int64)

    def refill(active: NDArray[np.bool_]) -> None:
        nonlocal state, position
        empty = active & (state < STATE)
        place = position[:, None] + np.cumsum(empty, axis=1) - 1
        word = np.take_along_axis(words, np.clip(place, 0, room - 1), axis=1)
        state = np.where(empty, state << 16 | word, state)
        position = np.minimum(position + empty.sum(axis=1), sizes + 1)

    for first in range(0, elements, lanes):
        here = np.s_[:, first : first + lanes]
        row, total = plan.row[here], plan.raw[here]
        near = np.minimum(total, SYMBOL_RAW)
        upper = state & ((1 << near) - 1)
        entry = code.slot[row, (state >> near) & (SLOTS - 1)].astype(np.int64)
        symbol = entry & 0xFF
        state = (entry >> 20) * (state >> (PRECISION + near)) + ((entry >> 8) & 0xFFF)
        refill(np.ones_like(state, bool))
        gone = symbol == code.escape[row]
        more = np.where(gone, 16, total - near)
        bits = state & ((1 << more) - 1)
        state = state >> more
        refill(more > 0)
        raw = upper << (total - near) | np.where(gone, 0, bits)
        word = _value(symbol, raw, plan, here, kind)
        if WIDTH[kind] == 32:
            bits = np.where(gone, (state & 0xFFFF) << 16 | bits, bits)
            state = np.where(gone, state >> 16, state)
            refill(gone)
        true[here] = np.where(gone, bits, word)
    if (position != sizes).any() or (state != STATE).any():
        raise ValueError("a token's bytes do not end with its last element")
    return true.astype(coarse.dtype)


def _plan(coarse: NDArray, sigma: NDArray[np.int16], kind: int) -> _Plan:
    mantissa, width, table = MANTISSA[kind], WIDTH[kind], plans(kind)
    bits = coarse.astype(np.int64)
    exponent = np.maximum((bits >> mantissa) & ((1 << (width - 1 - mantissa)) - 1), 1)
    b = sigma.astype(np.int64) - 8 * (exponent - BIAS[kind] - mantissa)
    plan = table[np.clip(b - LOWEST, 0, len(table) - 1)].astype(np.int64)
    cell = sigma.astype(np.int64) + BINADE_CELLS * BIAS[kind] - BELOW
    return _Plan(plan & 0xFF, plan >> 8, cell, bits)


def _symbols(
    true: Integers, plan: _Plan, kind: int
) -> tuple[Integers, Integers, NDArray[np.bool_]]:
    """Symbol, raw bits, and where the symbol is the escape."""
    code, width = exact_code(), WIDTH[kind]
    top = 1 << (width - 1)
    difference = (_ordered(true, width) - _ordered(plan.coarse, width) + top) % (2 * top) - top
    magnitude = true & (top - 1)
    cell = (magnitude >> plan.raw) - plan.cell
    other = (true ^ plan.coarse) >= top
    wide = plan.row >= MAGNITUDE_ROW
    symbol = np.where(wide, cell + CELLS * other, (difference >> plan.raw) - code.low[plan.row])
    escape = code.escape[plan.row]
    limit = np.where(wide, CELLS + CELLS * other, escape)
    escaped = (symbol < np.where(wide, CELLS * other, 0)) | (symbol >= limit)
    raw = np.where(wide, magnitude, difference) & ((1 << plan.raw) - 1)
    return np.where(escaped, escape, symbol), raw, escaped


def _value(
    symbol: Integers, raw: Integers, plan: _Plan, here: tuple[slice, slice], kind: int
) -> Integers:
    """Inverse of `_symbols`, for what is no escape."""
    width = WIDTH[kind]
    top = 1 << (width - 1)
    row, total, coarse = plan.row[here], plan.raw[here], plan.coarse[here]
    difference = ((symbol + exact_code().low[row]) << total) + raw
    ordered = (_ordered(coarse, width) + difference) % (2 * top)
    other = symbol >= CELLS
    magnitude = (((symbol - CELLS * other + plan.cell[here]) << total) + raw) & (top - 1)
    signed = magnitude | ((coarse & top) ^ (top * other))
    return np.where(row >= MAGNITUDE_ROW, signed, _unordered(ordered, width))


def _ordered(bits: Integers, width: int) -> Integers:
    """Bits of floats as integers of the same order; -0 lies just below +0."""
    top = 1 << (width - 1)
    return np.where(bits & top, 2 * top - 1 - bits, bits | top)


def _unordered(ordered: Integers, width: int) -> Integers:
    top = 1 << (width - 1)
    return np.where(ordered & top, ordered ^ top, 2 * top - 1 - ordered)
