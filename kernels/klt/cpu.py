# SPDX-License-Identifier: Apache-2.0
"""Codec `klt`, numba: fused page -> tier rows and tier rows -> page, one layer a call.

`reference.py` explains the operations. Reconstructions are equal bit for bit; K's codes may differ
by one where a sum of the encoder was rounded otherwise. Callers pass validated arrays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from lynx_kernels.hadamard.reference import hadamard_tables
from lynx_kernels.klt import reference as klt
from lynx_kernels.klt.cpu_decode import decode
from lynx_kernels.klt.cpu_encode import encode
from lynx_kernels.klt.reference import KltCode
from lynx_kernels.shared.paged import PagedKVCache
from lynx_kernels.shared.tiles_cpu import (
    LANES,
    PAGE_TYPES,
    READ_ROWS,
    WRITE_ROWS,
    compile_kernel,
    page_arguments,
    storage_type,
)
from numba import types
from numpy.typing import NDArray


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
        encode,
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
        decode,
        storage_type(itemsize),
        *PAGE_TYPES,
        *(_F2, _F2, types.boolean, _F3, _F2, _F2, _F1, _U2, _U2, table),
        *(_I, table, table, table),
        *(_I, _I, READ_ROWS, READ_ROWS, types.boolean, _I, _I, _I),
    )
