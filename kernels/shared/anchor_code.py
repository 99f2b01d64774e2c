# SPDX-License-Identifier: Apache-2.0
"""The anchor's 16-level code and the 4-bit refinement of its cells.

A Hadamard coefficient divided by its vector's scale is a number u in [-1, 1]. The anchor code cuts
[-1, 1] into 16 cells and keeps the cell (Lloyd-Max: cells and levels minimise the mean squared
error). The residual cuts each cell into 16 equal parts and keeps the part. Both nibbles together
are one of 256 ascending codes `anchor * 16 + residual`.

The optimum depends on how u is distributed, hence on how many elements share a maximum: the more,
the further it stands out. `derive` computes the tables below by Lloyd's algorithm on simulated
Gaussian vectors (Hadamard coefficients are close to Gaussian). Two roundings make them exact on
every machine at 0.2 % of the error: cell borders are multiples of 1/256, so that parts are
multiples of 1/4096, and levels are multiples of 1/4096. Hence 8,193 grid points decide every
code, and every reconstructed u is exact in float32.

The tables are part of the wire format: both ends derive theirs from head_dim alone.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CELLS = 16
GRID = 4096  # grid points per unit of u
BORDER_STEP = GRID // 256  # cell borders lie on every 16th grid point

# head_dim -> (7 borders in 1/256, 8 levels in 1/4096) of the positive half. Output of `derive`.
_HALF_TABLES: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {
    32: ((25, 50, 76, 104, 136, 171, 214), (197, 595, 1004, 1438, 1906, 2431, 3043, 3807)),
    64: ((23, 47, 72, 99, 129, 164, 209), (186, 562, 951, 1365, 1816, 2326, 2937, 3738)),
    128: ((22, 45, 68, 94, 123, 157, 202), (175, 530, 898, 1290, 1720, 2214, 2815, 3638)),
    256: ((21, 42, 65, 89, 116, 149, 193), (166, 502, 849, 1219, 1628, 2097, 2680, 3508)),
}


@dataclass(frozen=True)
class AnchorCode:
    """Lookup tables of one code.

    code_of_grid: uint8 [8193], the 256-level code of grid point i, where u = i / 4096 - 1
    anchor_level: float32 [16], u by anchor code alone (the cell's centroid)
    refined_level: float32 [256], u by anchor * 16 + residual (the middle of the part)
    refined_variance: expected squared error of refined_level
    """

    code_of_grid: NDArray[np.uint8]
    anchor_level: NDArray[np.float32]
    refined_level: NDArray[np.float32]
    refined_variance: float


@functools.cache
def anchor_code(head_dim: int) -> AnchorCode:
    """The code for vectors of `head_dim` elements: that of the nearest tabulated size."""
    size = min(_HALF_TABLES, key=lambda tabulated: abs(tabulated - head_dim))
    half_borders, half_levels = (np.array(half, dtype=np.int64) for half in _HALF_TABLES[size])
    one = GRID // BORDER_STEP
    borders = np.concatenate([[-one], -half_borders[::-1], [0], half_borders, [one]])
    levels = np.concatenate([-half_levels[::-1], half_levels])

    part_width = np.diff(borders)  # in grid points: a cell of w/256 has 16 parts of w/4096
    first = borders[:-1] * BORDER_STEP
    part_start = (first[:, None] + part_width[:, None] * np.arange(16)).ravel()
    part_middle = part_start + np.repeat(part_width, 16) / 2
    grid = np.arange(-GRID, GRID + 1)
    code_of_grid = np.searchsorted(part_start, grid, side="right") - 1
    # Optimal cells are as wide as density^(-1/3); inside a part u is uniform.
    squared_width = len(part_width) / (1 / (part_width / GRID) ** 2).sum()
    tables = AnchorCode(
        code_of_grid=code_of_grid.astype(np.uint8),
        anchor_level=(levels / GRID).astype(np.float32),
        refined_level=(part_middle / GRID).astype(np.float32),
        refined_variance=float(squared_width / 12),
    )
    for table in (tables.code_of_grid, tables.anchor_level, tables.refined_level):
        table.setflags(write=False)
    return tables


@dataclass(frozen=True)
class FineCode:
    """The anchor's cells in 32 parts each: a code of 9 bits, whose upper 8 are the code above.

    code9_of_grid: uint16 [16385], by grid point i, where u = i / 8192 - 1
    level9, level8: float32 [512] and [256], the middle of the part that 9 or 8 bits leave
    """

    code9_of_grid: NDArray[np.uint16]
    level9: NDArray[np.float32]
    level8: NDArray[np.float32]
    _cells: NDArray[np.float32]

    def anchor_level(self, bits: int) -> NDArray[np.float32]:
        """u by the upper `bits` bits alone: float32 [2^bits]."""
        if bits == 4:
            return self._cells
        middles = self.level9.reshape(1 << bits, -1).mean(axis=1, dtype=np.float64)
        return middles.astype(np.float32)


@functools.cache
def fine_code(head_dim: int) -> FineCode:
    """The finer code for vectors of `head_dim` elements."""
    coarse = anchor_code(head_dim)
    starts = np.searchsorted(coarse.code_of_grid, np.arange(0, 256, 16), side="left")
    borders = np.append(starts, 2 * GRID) - GRID
    width = np.diff(borders) // 16  # grid points of 1/8192 in a part of 1/32 cell
    part_start = (2 * borders[:-1, None] + width[:, None] * np.arange(32)).ravel()
    middle = part_start + np.repeat(width, 32) / 2
    code = np.searchsorted(part_start, np.arange(-2 * GRID, 2 * GRID + 1), side="right") - 1
    level9 = (middle / (2 * GRID)).astype(np.float32)
    tables = FineCode(code.astype(np.uint16), level9, coarse.refined_level, coarse.anchor_level)
    for table in (tables.code9_of_grid, tables.level9):
        table.setflags(write=False)
    return tables


def derive(head_dim: int, seed: int = 1, elements: int = 1 << 21) -> tuple[list[int], list[int]]:
    """One entry of the table: Lloyd's algorithm on |u| of simulated vectors.

    The simulated scale is the absolute maximum raised by 0 to 1/8 octave, as the stored scale is.
    Returns the 7 inner borders in 1/256 and the 8 levels in 1/4096 of the positive half (the
    negative half is its mirror image). Deterministic for one numpy release line.
    """
    rng = np.random.default_rng(seed)
    vectors = np.abs(rng.standard_normal((elements // head_dim, head_dim), dtype=np.float32))
    raised = np.exp2(rng.uniform(0, 1 / 8, (len(vectors), 1)))
    u = np.sort((vectors / (vectors.max(axis=1, keepdims=True) * raised)).ravel())
    sums = np.concatenate([[0.0], np.cumsum(u, dtype=np.float64)])
    levels = (np.arange(8) + 0.5) / 8
    while True:
        inner = (levels[1:] + levels[:-1]) / 2
        edges = np.concatenate([[0], np.searchsorted(u, inner), [len(u)]])
        updated = np.diff(sums[edges]) / np.diff(edges)
        converged = np.abs(updated - levels).max() < 1e-6
        levels = updated
        if converged:
            break
    borders = np.rint((levels[1:] + levels[:-1]) / 2 * (GRID // BORDER_STEP)).astype(int)
    return borders.tolist(), np.rint(levels * GRID).astype(int).tolist()
