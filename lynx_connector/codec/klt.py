# SPDX-License-Identifier: Apache-2.0
"""Two tiers with learned tables: K by a KLT per head before RoPE, V by mean and Hadamard.

anchor: D * anchor_bits / 8 bytes a vector [L, 2, H], then one scale byte a vector; residual: a
layer's K vectors, then its V vectors, which have half a bit an element less and more than 8 bits
leave: 8.125 bits in all for head_dim 64. `lynx_kernels.klt.reference` defines the code.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from lynx_kernels.hadamard import reference as hadamard
from lynx_kernels.klt import cpu as klt_cpu
from lynx_kernels.klt import reference as klt
from lynx_kernels.shared.anchor_code import anchor_code
from lynx_kernels.shared.error_steps import NO_ERROR, error_steps
from lynx_kernels.shared.paged import PagedKVCache
from numpy.typing import NDArray

from lynx_connector.codec.base import Codec
from lynx_connector.codec.klt_tables import ANCHOR_BITS, KltTables
from lynx_connector.codec.types import CodecError, KVGeometry, Rows, Tier

if TYPE_CHECKING:
    from lynx_kernels.klt.gpu import KltDevice

_TOKENS = 64  # that the torch reference takes at once, to bound its scratch memory


class KltCodec(Codec):
    """Needs tables; anchor_bits is 3, 4 or 5. head_dim must be a multiple of 16."""

    name: ClassVar[str] = "klt"
    tiers: ClassVar[tuple[Tier, ...]] = (Tier.ANCHOR, Tier.RESIDUAL)

    def __init__(self, geometry: KVGeometry, tables: KltTables | None, anchor_bits: int) -> None:
        super().__init__(geometry)
        if geometry.head_dim % 16:
            raise CodecError(
                f"codec {self.name}: head_dim {geometry.head_dim} is not a multiple of 16"
            )
        if anchor_bits not in ANCHOR_BITS:
            raise CodecError(f"codec {self.name}: anchor_bits {anchor_bits} is not 3, 4 or 5")
        if tables is None:
            raise CodecError(f"codec {self.name}: needs tables, and none have been learned")
        self.tables, self.anchor_bits = tables, anchor_bits
        self._code = tables.code(anchor_bits)
        self._scales = geometry.vectors_per_token
        self._devices: dict[torch.device, KltDevice] = {}

    @classmethod
    def row_widths(cls, geometry: KVGeometry, anchor_bits: int) -> dict[Tier, int]:
        """Bytes of a token's row by tier; tables do not matter."""
        anchor, k, v = klt.vector_bytes(geometry.head_dim, anchor_bits)
        vectors = geometry.vectors_per_token
        return {Tier.ANCHOR: vectors * (anchor + 1), Tier.RESIDUAL: vectors // 2 * (k + v)}

    def exceptions(self, anchor: Rows) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        token, vector = np.nonzero(anchor[:, -self._scales :] == hadamard.SCALE_NONFINITE)
        return token, vector

    def error_spread(self, anchor: Rows) -> NDArray[np.int16]:
        spread = np.arange(256, dtype=np.int16) - np.int16(hadamard.SCALE_BIAS)
        spread[hadamard.SCALE_ZERO] = NO_ERROR
        return spread[anchor[:, -self._scales :]]

    @functools.cached_property
    def _tilt(self) -> NDArray[np.int16]:
        """K: levels are odd integers, so that a component's error is uniform in (-1, 1)."""
        code, d = self._code, self.geometry.head_dim
        basis = code.basis.astype(np.float64)
        unit = code.k_unit.astype(np.float64)[..., None]
        k = (basis * basis).sum(axis=-2) * (unit * unit / 3)
        one, two = code.rotation.elements
        k[..., one] = k[..., two] = (k[..., one] + k[..., two]) / 2  # the angle is anything
        # Half of V's components have parts of half the width.
        v = np.full_like(k, anchor_code(d).refined_variance * 0.625)
        return error_steps(np.stack((k, v), axis=1))

    @property
    def error_tilt(self) -> NDArray[np.int16]:
        return self._tilt

    def warmup(self, cache: PagedKVCache | None = None) -> None:
        if cache is None or cache.device.type == "cpu":
            klt_cpu.compile_kernels(self.dtype.itemsize)
        else:
            super().warmup(cache)

    def _on_device(self, device: torch.device) -> KltDevice:
        from lynx_kernels.klt.gpu import KltDevice

        if device not in self._devices:
            self._devices[device] = KltDevice.of(self._code, device)
        return self._devices[device]

    def encode_device(
        self,
        cache: PagedKVCache,
        slots: torch.Tensor,
        out: Mapping[Tier, torch.Tensor],
        first_position: int = 0,
    ) -> None:
        from lynx_kernels.klt import gpu as klt_gpu

        layers = self._on_device(cache.device)
        rows = out[Tier.ANCHOR], out[Tier.RESIDUAL]
        klt_gpu.encode(cache, slots, layers, *rows, first_position)

    def decode_device(
        self,
        tiers: Sequence[torch.Tensor],
        cache: PagedKVCache,
        slots: torch.Tensor,
        first_position: int = 0,
    ) -> None:
        from lynx_kernels.klt import gpu as klt_gpu

        layers = self._on_device(cache.device)
        residual = tiers[1] if len(tiers) == 2 else None
        klt_gpu.decode(cache, slots, layers, tiers[0], residual, first_position)

    @functools.cached_property
    def _layers(self) -> klt_cpu.KltLayers:
        return klt_cpu.KltLayers.of(self._code)

    def encode_values(
        self, values: torch.Tensor, first_position: int = 0
    ) -> dict[Tier, torch.Tensor]:
        parts = [
            klt.encode(self._code, values[start : start + _TOKENS], first_position + start)
            for start in range(0, max(len(values), 1), _TOKENS)
        ]
        return dict(zip(self.tiers, map(torch.cat, zip(*parts, strict=True)), strict=True))

    def decode_values(self, tiers: Sequence[torch.Tensor], first_position: int = 0) -> torch.Tensor:
        parts = []
        for start in range(0, max(len(tiers[0]), 1), _TOKENS):
            anchor, *rest = (rows[start : start + _TOKENS] for rows in tiers)
            residual = rest[0] if rest else None
            parts.append(
                klt.decode(self._code, anchor, residual, first_position + start, self.dtype)
            )
        return torch.cat(parts)

    def _row_bytes(self, tier: Tier) -> int:
        return self.row_widths(self.geometry, self.anchor_bits)[tier]

    def _encode_cpu(
        self,
        cache: PagedKVCache,
        slots: NDArray[np.int64],
        out: Mapping[Tier, Rows],
        first_position: int,
    ) -> None:
        klt_cpu.encode_layers(
            cache, slots, self._layers, out[Tier.ANCHOR], out[Tier.RESIDUAL], first_position
        )

    def _decode_cpu(
        self,
        tiers: Sequence[Rows],
        cache: PagedKVCache,
        slots: NDArray[np.int64],
        first_position: int,
    ) -> None:
        residual = tiers[1] if len(tiers) == 2 else None
        klt_cpu.decode_layers(cache, slots, self._layers, tiers[0], residual, first_position)
