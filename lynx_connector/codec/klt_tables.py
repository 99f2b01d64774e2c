# SPDX-License-Identifier: Apache-2.0
"""What `klt` knows of one model: means, KLT bases and component widths, named by content."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from lynx_connector.codec.base import CodecError, KVGeometry

VERSION = 1
ANCHOR_BITS = (3, 4, 5)
MAX_WIDTH = 7  # anchor bits of one K component; its whole code has 4 more
_HEADER_BYTES = 512


class _Stored(msgspec.Struct, forbid_unknown_fields=True):
    version: int
    shape: tuple[int, int, int]
    rotation: str
    k_mean: bytes
    k_basis: bytes
    k_unit: bytes
    widths: bytes
    v_mean: bytes


@dataclass(frozen=True)
class KltTables:
    """Tables of one worker's shard.

    k_mean, v_mean: float32 [L, H, D]; k_basis: int16 [L, H, D, D], row i is component i in units
    of k_unit, float32 [L, H]; widths: uint8 [3, L, H, D], bits of each K component in an anchor of
    3, 4 and 5 bits; rotation: "" (the KLT is applied after RoPE).
    """

    geometry: KVGeometry
    k_mean: NDArray[np.float32]
    k_basis: NDArray[np.int16]
    k_unit: NDArray[np.float32]
    widths: NDArray[np.uint8]
    v_mean: NDArray[np.float32]
    rotation: str = ""

    @functools.cached_property
    def digest(self) -> str:
        """Name of the tables: 32 hex digits of the sha256 of their bytes."""
        return hashlib.sha256(self.to_bytes()).hexdigest()[:32]

    def to_bytes(self) -> bytes:
        """Little-endian arrays in MessagePack."""
        g = self.geometry
        return msgspec.msgpack.encode(
            _Stored(
                VERSION,
                (g.num_layers, g.num_kv_heads, g.head_dim),
                self.rotation,
                *(array.tobytes() for array in self._arrays()),
            )
        )

    def _arrays(self) -> tuple[NDArray[np.generic], ...]:
        return self.k_mean, self.k_basis, self.k_unit, self.widths, self.v_mean

    @staticmethod
    def max_bytes(geometry: KVGeometry) -> int:
        """No tables of this geometry are larger."""
        vectors = geometry.num_layers * geometry.num_kv_heads
        d = geometry.head_dim
        return vectors * (2 * d * d + 4 * d + 4 + 3 * d + 4 * d) + _HEADER_BYTES

    @classmethod
    def from_bytes(cls, data: bytes, geometry: KVGeometry) -> KltTables:
        """Inverse of `to_bytes`. Raises CodecError naming what is wrong."""
        try:
            stored = msgspec.msgpack.decode(data, type=_Stored)
        except msgspec.DecodeError as error:
            raise CodecError(f"tables are malformed: {error}") from None
        if stored.version != VERSION:
            raise CodecError(f"tables have version {stored.version}, expected {VERSION}")
        g = geometry
        shape = (g.num_layers, g.num_kv_heads, g.head_dim)
        if stored.shape != shape:
            raise CodecError(
                f"tables have the shape (layers, heads, head_dim) {stored.shape}, expected {shape}"
            )
        if stored.rotation:
            raise CodecError(f"tables with rotation {stored.rotation!r} are not supported")
        vectors, d = shape[:2], g.head_dim
        tables = cls(
            geometry,
            _array("k_mean", stored.k_mean, "<f4", (*vectors, d)),
            _array("k_basis", stored.k_basis, "<i2", (*vectors, d, d)),
            _array("k_unit", stored.k_unit, "<f4", vectors),
            _array("widths", stored.widths, "u1", (len(ANCHOR_BITS), *vectors, d)),
            _array("v_mean", stored.v_mean, "<f4", (*vectors, d)),
        )
        tables.check()
        return tables

    def check(self) -> None:
        """Raises CodecError unless every code fits its row and every sum is exact."""
        for array in (self.k_mean, self.k_unit, self.v_mean):
            if not np.isfinite(array).all():
                raise CodecError("tables hold values that are not finite")
        widths = self.widths.astype(np.int64)
        bits = np.array(ANCHOR_BITS)[:, None, None]
        if (widths.sum(-1) != bits * self.geometry.head_dim).any() or widths.max() > MAX_WIDTH + 1:
            raise CodecError("tables have component widths that do not fill their rows")
        if (np.diff(widths, axis=0) < 0).any() or (widths[2] > widths[1] + 4).any():
            raise CodecError("tables have anchors of different bits that do not nest")
        largest = (np.abs(self.k_basis.astype(np.int64)) << (widths[1] + 4)[..., None]).sum(-2)
        if largest.max() >= 1 << 24:
            raise CodecError("tables have a basis whose sums are not exact in float32")


def _array(name: str, data: bytes, dtype: str, shape: tuple[int, ...]) -> NDArray:
    count = int(np.prod(shape))
    if len(data) != count * np.dtype(dtype).itemsize:
        raise CodecError(f"tables hold {len(data)} bytes of {name}, expected {count} elements")
    return np.frombuffer(data, dtype).reshape(shape)
