# SPDX-License-Identifier: Apache-2.0
"""Plain symmetric int8 and int4 per token and head: one tier, the baselines of every comparison.

Row = codes [L, 2, H, D * bits / 8], then bfloat16 scales [L, 2, H]: 8.25 and 4.25 bits per element
for head_dim 64. `lynx_kernels.uniform.reference` defines the code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from lynx_kernels.shared.paged import PagedKVCache
from lynx_kernels.uniform import cpu as uniform_cpu
from lynx_kernels.uniform import reference as uniform
from numpy.typing import NDArray

from lynx_connector.codec.base import Codec
from lynx_connector.codec.types import CodecError, KVGeometry, Rows, Tier


class UniformCodec(Codec):
    """Common part of `Int8Codec` and `Int4Codec`; `bits` is the width of one code.

    head_dim must be a multiple of 8.
    """

    tiers: ClassVar[tuple[Tier, ...]] = (Tier.ANCHOR,)
    bits: ClassVar[int]

    def __init__(self, geometry: KVGeometry) -> None:
        super().__init__(geometry)
        if geometry.head_dim % 8:
            raise CodecError(
                f"codec {self.name}: head_dim {geometry.head_dim} is not a multiple of 8"
            )
        self._code_bytes = geometry.elements_per_token * self.bits // 8

    def encode_values(
        self, values: torch.Tensor, first_position: int = 0
    ) -> dict[Tier, torch.Tensor]:
        codes, scales = uniform.encode(values, self.bits)
        return {Tier.ANCHOR: torch.cat((codes.flatten(1), scales.flatten(1)), dim=1)}

    def decode_values(self, tiers: Sequence[torch.Tensor], first_position: int = 0) -> torch.Tensor:
        codes = self._vectors(tiers[0][:, : self._code_bytes])
        scales = self._vectors(tiers[0][:, self._code_bytes :])
        return uniform.decode(codes, scales, self.bits, self.dtype)

    def _row_bytes(self, tier: Tier) -> int:
        return self._code_bytes + 2 * self.geometry.vectors_per_token

    def _encode_cpu(
        self,
        cache: PagedKVCache,
        slots: NDArray[np.int64],
        out: Mapping[Tier, Rows],
        first_position: int,
    ) -> None:
        for layer in range(cache.num_layers):
            uniform_cpu.encode_layer(cache, layer, slots, out[Tier.ANCHOR], self.bits)

    def _decode_cpu(
        self,
        tiers: Sequence[Rows],
        cache: PagedKVCache,
        slots: NDArray[np.int64],
        first_position: int,
    ) -> None:
        for layer in range(cache.num_layers):
            uniform_cpu.decode_layer(cache, layer, slots, tiers[0], self.bits)

    def encode_device(
        self,
        cache: PagedKVCache,
        slots: torch.Tensor,
        out: Mapping[Tier, torch.Tensor],
        first_position: int = 0,
    ) -> None:
        from lynx_kernels.uniform import gpu as uniform_gpu

        uniform_gpu.encode(cache, slots, out[Tier.ANCHOR], self.bits)

    def decode_device(
        self,
        tiers: Sequence[torch.Tensor],
        cache: PagedKVCache,
        slots: torch.Tensor,
        first_position: int = 0,
    ) -> None:
        from lynx_kernels.uniform import gpu as uniform_gpu

        uniform_gpu.decode(cache, slots, tiers[0], self.bits)


class Int8Codec(UniformCodec):
    name: ClassVar[str] = "int8"
    bits: ClassVar[int] = 8


class Int4Codec(UniformCodec):
    name: ClassVar[str] = "int4"
    bits: ClassVar[int] = 4
