# SPDX-License-Identifier: Apache-2.0
"""The exact tier's code: how far a true value lies from its reconstruction, as rANS symbols.

The error of a reconstructed value c is taken as Gaussian, of a standard deviation sigma that the
codec names in 1/8 octaves. Let b = 8 * log2(sigma / ulp(c)), an integer, and d the difference of
the ordered codes (integers in the order of the floats) of the true value and of c.

- b < 24: d itself is the symbol, one table for each quarter octave of sigma.
- b >= 24: the lowest bits of d are sent raw, as many as leave sigma between 4 and 8.
- b >= 8 * mantissa bits - 8 (sigma above |c| / 4, one value in 80): the codes are far from
  linear there, and a difference across zero is as long as the exponent's range. So the magnitude is
  coded beside that of sigma: eight symbols a binade and sign, further mantissa bits raw.

What has no symbol is an escape, followed by the true bits.

Frequencies add up to 4096 in each table. They are part of the wire format, and derived by integer
arithmetic, float64 multiplications and additions alone, which are the same everywhere.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PRECISION = 12  # bits of a frequency
SYMBOL_RAW = 4  # raw bits that are coded together with the symbol; more follow apart
SLOTS = 1 << PRECISION
MAX_SYMBOLS = 256

# MANTISSA[kind], BIAS[kind], WIDTH[kind]: kinds as in `tiles_cpu` (bfloat16, float16, float32).
MANTISSA = (7, 10, 23)
BIAS = (127, 15, 127)
WIDTH = (16, 16, 32)

LOWEST = -48  # b below it are as good as certain
SPLIT = 24  # b from which low bits are raw
BINADE_CELLS = 8  # symbols a binade where the magnitude is coded
BELOW, CELLS = 56, 80  # of them below sigma, and in all: 2^-7 to 2^3 sigma

_ESCAPE = 4  # frequency of the escape: real errors have heavier tails than a Gaussian
_REACH = 4.0  # symbols up to this many sigma
_GRID = 256  # points an ulp at which the density is summed
_UNIT = float(1 << 30)
# 2^(1/16), 2^(5/16), 2^(9/16), 2^(13/16): the middles of quarter octaves. Literals, since exp2 may
# differ in its last bit between machines.
_QUARTERS = (1.0442737824274138, 1.241857812073484, 1.4768261459394993, 1.7562521603732995)
_CENTRES = (2.0, 1.0, 0.5, 0.0)  # |c| / sigma, about, of the tables by magnitude, an octave each
_AROUND = (0.65, 0.85, 1.1, 1.4)  # and how it varies inside the octave


@dataclass(frozen=True)
class ExactCode:
    """Tables; `rows` of them.

    slot: uint32 [rows, 4096], frequency << 20 | (slot - start) << 8 | symbol
    start, frequency: uint32 [rows, 256] by symbol
    low: int32 [rows], the difference that symbol 0 stands for
    escape: int32 [rows], the last symbol
    """

    slot: NDArray[np.uint32]
    start: NDArray[np.uint32]
    frequency: NDArray[np.uint32]
    low: NDArray[np.int32]
    escape: NDArray[np.int32]


@functools.cache
def exact_code() -> ExactCode:
    """The tables: quarter octaves below SPLIT, the four of a split sigma, those by magnitude."""
    masses = [_plain(b) for b in range(LOWEST, SPLIT, 2)]
    masses += [_split(sigma * 4) for sigma in _QUARTERS]
    masses += [(_magnitude(centre), 0) for centre in _CENTRES]
    rows = len(masses)
    slot = np.zeros((rows, SLOTS), np.uint32)
    start = np.zeros((rows, MAX_SYMBOLS), np.uint32)
    frequency = np.zeros((rows, MAX_SYMBOLS), np.uint32)
    low = np.zeros(rows, np.int32)
    escape = np.zeros(rows, np.int32)
    for row, (mass, first) in enumerate(masses):
        counts = _frequencies(mass)
        starts = np.cumsum(counts) - counts
        symbol = np.repeat(np.arange(len(counts)), counts)
        slot[row] = counts[symbol] << 20 | (np.arange(SLOTS) - starts[symbol]) << 8 | symbol
        start[row, : len(counts)], frequency[row, : len(counts)] = starts, counts
        low[row], escape[row] = first, len(counts) - 1
    code = ExactCode(slot, start, frequency, low, escape)
    for table in (slot, start, frequency, low, escape):
        table.setflags(write=False)
    return code


MAGNITUDE_ROW = (SPLIT - LOWEST) // 2 + len(_QUARTERS)  # rows from here on code magnitudes


@functools.cache
def plans(kind: int) -> NDArray[np.uint16]:
    """By b - LOWEST, clipped to the table: row | raw bits << 8."""
    mantissa = MANTISSA[kind]
    b = np.arange(LOWEST, 8 * (mantissa - 1 + len(_CENTRES)))
    split = (b - SPLIT) // 8
    row = np.where(b < SPLIT, (b - LOWEST) // 2, (SPLIT - LOWEST) // 2 + (b - SPLIT) % 8 // 2)
    wide = b // 8 - (mantissa - 1)
    row = np.where(wide < 0, row, MAGNITUDE_ROW + wide)
    raw = np.clip(split + 1, 0, mantissa - 3)
    plan = (row | raw << 8).astype(np.uint16)
    plan.setflags(write=False)
    return plan


def lanes_of(elements: int) -> int:
    """Interleaved coders of a token: at most 32, each of at least 1,024 elements, all of one
    length. Their final states are 4 bytes each."""
    lanes = 1
    while lanes < 32 and elements % (2 * lanes) == 0 and elements >= 2048 * lanes:
        lanes *= 2
    return lanes


def _plain(b: int) -> tuple[NDArray[np.int64], int]:
    """c was rounded to its dtype, so that its own error is uniform on top of the Gaussian's."""
    octave, quarter = divmod(b, 8)
    sigma = _QUARTERS[quarter // 2] * 2.0**octave
    reach = max(1, int(_REACH * sigma + 1.5))
    weight = _GRID - np.abs(np.arange(-_GRID, _GRID + 1))
    points = np.arange(-(reach + 1) * _GRID, (reach + 1) * _GRID + 1)
    density = _bell(points / (_GRID * sigma))
    steps = range(2 * reach + 1)
    mass = [(density[s * _GRID : (s + 2) * _GRID + 1] * weight).sum() for s in steps]
    return np.array(mass), -reach


def _split(sigma: float) -> tuple[NDArray[np.int64], int]:
    """Symbol s stands for the differences from s on to s + 1, less half an ulp of c."""
    reach = int(_REACH * sigma + 1.5)
    points = np.arange(-reach * _GRID, (reach + 1) * _GRID) - _GRID // 8
    density = _bell(points / (_GRID * sigma))
    return density.reshape(-1, _GRID).sum(axis=1), -reach


def _magnitude(centre: float) -> NDArray[np.int64]:
    """Cells of values with c's sign, then those with the other, in units of sigma."""
    cell = np.arange(-BELOW, CELLS - BELOW)
    octave = cell // BINADE_CELLS
    width = np.ldexp(1.0, octave) / BINADE_CELLS
    start = np.ldexp(1.0, octave) + (cell % BINADE_CELLS) * width
    points = start[:, None] + width[:, None] * ((np.arange(16) + 0.5) / 16)
    both = np.zeros((2, len(cell)), np.int64)
    for factor in _AROUND:
        both[0] += _bell(points - factor * centre).sum(axis=1)
        both[1] += _bell(points + factor * centre).sum(axis=1)
    return (both << (octave - octave[0])).ravel()


def _bell(x: NDArray[np.float64]) -> NDArray[np.int64]:
    """About exp(-x^2 / 2) * 2^30, as (1 - x^2 / 2 / 4096)^4096."""
    y = 1.0 - np.minimum(x * x, 8192.0) * (0.5 / 4096)
    for _ in range(12):
        y = y * y
    return (y * _UNIT).astype(np.int64)


def _frequencies(mass: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positive, of the sum SLOTS, the escape's at the end."""
    total = SLOTS - _ESCAPE
    counts = np.maximum((mass * total + mass.sum() // 2) // mass.sum(), 1)
    counts[counts.argmax()] += total - counts.sum()
    return np.append(counts, _ESCAPE)
