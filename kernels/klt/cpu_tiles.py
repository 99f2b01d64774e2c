# SPDX-License-Identifier: Apache-2.0
"""Arithmetic on whole tiles of codec `klt`: means, rotation, products with a basis.

Loops over whole tiles, which the compiler turns into SIMD; of LANES steps it makes single ones.
"""

from __future__ import annotations

import numba
import numpy as np
from lynx_kernels.shared.tiles_cpu import LANES
from numpy import uint64


@numba.njit(error_model="numpy")
def turn(tile, cos, sin, is_neox, sign):
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


@numba.njit(error_model="numpy")
def add(tile, mean, sign):
    for i in range(tile.size):
        tile[i] = tile[i] + mean[i] * sign


@numba.njit(error_model="numpy")
def scaled(x, factor, y):
    for i in range(y.size):
        y[i] = x[i] * factor[i]


@numba.njit(error_model="numpy", fastmath={"contract", "reassoc"})
def multiply(matrix, x, y):
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
