# SPDX-License-Identifier: Apache-2.0
"""What `klt` knows of one model: means, KLT bases and component widths, named by content."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass

import msgspec
import numpy as np
from lynx_kernels.klt.reference import K_BITS, MAX_WIDTH, KltCode, v_widths
from lynx_kernels.shared.rotation import NO_ROTATION, Rotation
from numpy.typing import NDArray

from lynx_connector.codec.types import CodecError, KVGeometry
from lynx_connector.errors import shown

VERSION = 2
ANCHOR_BITS = (3, 4, 5)
BASIS_LIMIT = 1023  # entries of 10 bits and a sign are exact on TF32 tensor cores
_HEADER_BYTES = 512


class _Stored(msgspec.Struct, forbid_unknown_fields=True):
    version: int
    shape: tuple[int, int, int]
    is_neox: bool
    steps: bytes
    k_mean: bytes
    k_basis: bytes
    k_unit: bytes
    widths: bytes
    v_mean: bytes


@dataclass(frozen=True)
class KltTables:
    """Tables of one worker's shard.

    k_mean, v_mean: float32 [L, H, D]; k_basis: int16 [L, H, D, D], row i is component i in units
    of k_unit, float32 [L, H]; widths: uint8 [4, L, H, D], bits of each K component in an anchor of
    3, 4 and 5 bits and in all; rotation: what K is rotated back by before the KLT.
    """

    geometry: KVGeometry
    k_mean: NDArray[np.float32]
    k_basis: NDArray[np.int16]
    k_unit: NDArray[np.float32]
    widths: NDArray[np.uint8]
    v_mean: NDArray[np.float32]
    rotation: Rotation = NO_ROTATION

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
                self.rotation.is_neox,
                np.array(self.rotation.steps, dtype="<u4").tobytes(),
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
        return vectors * (2 * d * d + 4 * d + 4 + 4 * d + 4 * d) + 2 * d + _HEADER_BYTES

    @classmethod
    def from_bytes(cls, data: bytes, geometry: KVGeometry) -> KltTables:
        """Inverse of `to_bytes`. Raises CodecError naming what is wrong."""
        try:
            stored = msgspec.msgpack.decode(data, type=_Stored)
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            raise CodecError(f"tables are malformed: {shown(str(error))}") from None
        if stored.version != VERSION:
            raise CodecError(f"tables have version {stored.version}, expected {VERSION}")
        g = geometry
        shape = (g.num_layers, g.num_kv_heads, g.head_dim)
        if stored.shape != shape:
            raise CodecError(
                f"tables have the shape (layers, heads, head_dim) {stored.shape}, expected {shape}"
            )
        vectors, d = shape[:2], g.head_dim
        if len(stored.steps) % 4 or len(stored.steps) > 2 * d:
            raise CodecError(f"tables hold {len(stored.steps)} bytes of steps for head_dim {d}")
        steps = np.frombuffer(stored.steps, "<u4").tolist()
        tables = cls(
            geometry,
            _array("k_mean", stored.k_mean, "<f4", (*vectors, d)),
            _array("k_basis", stored.k_basis, "<i2", (*vectors, d, d)),
            _array("k_unit", stored.k_unit, "<f4", vectors),
            _array("widths", stored.widths, "u1", (len(ANCHOR_BITS) + 1, *vectors, d)),
            _array("v_mean", stored.v_mean, "<f4", (*vectors, d)),
            Rotation(tuple(steps), stored.is_neox),
        )
        tables.check()
        return tables

    def check(self) -> None:
        """Raises CodecError unless every code fits its row and every sum is exact."""
        for array in (self.k_mean, self.k_unit, self.v_mean):
            if not np.isfinite(array).all():
                raise CodecError("tables hold values that are not finite")
        widths = self.widths.astype(np.int64)
        bits = np.array([*ANCHOR_BITS, K_BITS])[:, None, None]
        if (widths.sum(-1) != bits * self.geometry.head_dim).any() or widths.max() > MAX_WIDTH:
            raise CodecError("tables have component widths that do not fill their rows")
        if (np.diff(widths, axis=0) < 0).any():
            raise CodecError("tables have anchors of different bits that do not nest")
        if np.abs(self.k_basis.astype(np.int64)).max() > BASIS_LIMIT:
            raise CodecError(f"tables have a basis with entries beyond {BASIS_LIMIT}")
        largest = (np.abs(self.k_basis.astype(np.int64)) << widths[-1][..., None]).sum(-2)
        if largest.max() >= 1 << 24:
            raise CodecError("tables have a basis whose sums are not exact in float32")
        if not (np.linalg.matrix_rank(self.k_basis.astype(np.float32)) == widths.shape[-1]).all():
            raise CodecError("tables have a basis that is not invertible")

    def code(self, anchor_bits: int) -> KltCode:
        """What the kernels need, for anchors of so many bits."""
        d = self.geometry.head_dim
        basis = self.k_basis.astype(np.float64)
        unit = self.k_unit.astype(np.float64)[..., None, None]
        total_v = np.broadcast_to(v_widths(d), self.v_mean.shape)
        upper_v = np.full_like(total_v, anchor_bits)
        upper_k = self.widths[ANCHOR_BITS.index(anchor_bits)].astype(np.int64)
        return KltCode(
            self.rotation,
            np.ascontiguousarray((np.linalg.inv(basis) / unit).swapaxes(-1, -2), np.float32),
            basis.astype(np.float32),
            np.array(self.k_unit),
            np.array(self.k_mean),
            np.array(self.v_mean),
            np.stack((upper_k, upper_v), axis=1),
            np.stack((self.widths[-1].astype(np.int64), total_v), axis=1),
            anchor_bits,
        )


def _array(name: str, data: bytes, dtype: str, shape: tuple[int, ...]) -> NDArray:
    count = int(np.prod(shape))
    if len(data) != count * np.dtype(dtype).itemsize:
        raise CodecError(f"tables hold {len(data)} bytes of {name}, expected {count} elements")
    return np.frombuffer(data, dtype).reshape(shape)
