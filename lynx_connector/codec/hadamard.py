# SPDX-License-Identifier: Apache-2.0
"""Two tiers from one Hadamard-transformed 8-bit code, without tables: until `klt` has learned some.

anchor: 4-bit Lloyd-Max cell per element plus one scale byte per vector; row = codes [L, 2, H, D/2],
then scales [L, 2, H]. residual: 4-bit place inside the cell; row = [L, 2, H, D/2]. For head_dim 64
that is 4.125 and 4 bits per element. `lynx_kernels.hadamard.reference` defines the code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from lynx_kernels.hadamard import cpu as hadamard_cpu
from lynx_kernels.hadamard import reference as hadamard
from lynx_kernels.shared.paged import PagedKVCache
from numpy.typing import NDArray

from lynx_connector.codec.base import Codec
from lynx_connector.codec.types import CodecError, KVGeometry, Rows, Tier


class HadamardCodec(Codec):
    """head_dim must be a multiple of 8."""

    name: ClassVar[str] = "hadamard"
    tiers: ClassVar[tuple[Tier, ...]] = (Tier.ANCHOR, Tier.RESIDUAL)

    def __init__(self, geometry: KVGeometry) -> None:
        super().__init__(geometry)
        try:
            hadamard.hadamard_tables(geometry.head_dim)
        except ValueError as error:
            raise CodecError(f"codec {self.name}: {error}") from None
        self._code_bytes = geometry.elements_per_token // 2
        self._spread = hadamard.error_spread(geometry.head_dim)

    def encode_values(
        self, values: torch.Tensor, first_position: int = 0
    ) -> dict[Tier, torch.Tensor]:
        anchor, scale, residual = hadamard.encode(values)
        return {
            Tier.ANCHOR: torch.cat((anchor.flatten(1), scale.flatten(1)), dim=1),
            Tier.RESIDUAL: residual.flatten(1),
        }

    def decode_values(self, tiers: Sequence[torch.Tensor], first_position: int = 0) -> torch.Tensor:
        anchor = self._vectors(tiers[0][:, : self._code_bytes])
        scale = self._vectors(tiers[0][:, self._code_bytes :]).squeeze(-1)
        residual = self._vectors(tiers[1]) if len(tiers) == 2 else None
        return hadamard.decode(anchor, scale, residual, self.dtype)

    def exceptions(self, anchor: Rows) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        token, vector = np.nonzero(anchor[:, self._code_bytes :] == hadamard.SCALE_NONFINITE)
        return token, vector

    def error_spread(self, anchor: Rows) -> NDArray[np.int16]:
        return self._spread[anchor[:, self._code_bytes :]]

    def _row_bytes(self, tier: Tier) -> int:
        scales = self.geometry.vectors_per_token if tier == Tier.ANCHOR else 0
        return self._code_bytes + scales

    def _encode_cpu(
        self,
        cache: PagedKVCache,
        slots: NDArray[np.int64],
        out: Mapping[Tier, Rows],
        first_position: int,
    ) -> None:
        for layer in range(cache.num_layers):
            hadamard_cpu.encode_layer(cache, layer, slots, out[Tier.ANCHOR], out[Tier.RESIDUAL])

    def _decode_cpu(
        self,
        tiers: Sequence[Rows],
        cache: PagedKVCache,
        slots: NDArray[np.int64],
        first_position: int,
    ) -> None:
        residual = tiers[1] if len(tiers) == 2 else None
        for layer in range(cache.num_layers):
            hadamard_cpu.decode_layer(cache, layer, slots, tiers[0], residual)

    def encode_device(
        self,
        cache: PagedKVCache,
        slots: torch.Tensor,
        out: Mapping[Tier, torch.Tensor],
        first_position: int = 0,
    ) -> None:
        from lynx_kernels.hadamard import gpu as hadamard_gpu

        hadamard_gpu.encode(cache, slots, out[Tier.ANCHOR], out[Tier.RESIDUAL])

    def decode_device(
        self,
        tiers: Sequence[torch.Tensor],
        cache: PagedKVCache,
        slots: torch.Tensor,
        first_position: int = 0,
    ) -> None:
        from lynx_kernels.hadamard import gpu as hadamard_gpu

        hadamard_gpu.decode(cache, slots, tiers[0], tiers[1] if len(tiers) == 2 else None)
