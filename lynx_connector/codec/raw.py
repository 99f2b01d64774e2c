# SPDX-License-Identifier: Apache-2.0
"""The cache's own bits, unchanged: one tier. Also carries the tokens that must travel exactly.

Registered as "bf16" after the usual cache dtype; it sends float16 and float32 caches unchanged
too. Row = [L, 2, H, D] in the cache's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from lynx_kernels.raw import cpu as raw_cpu
from lynx_kernels.raw import reference as raw
from lynx_kernels.shared.paged import PagedKVCache
from numpy.typing import NDArray

from lynx_connector.codec.base import Codec
from lynx_connector.codec.types import Rows, Tier


class RawCodec(Codec):
    """Any geometry; NaN and infinity travel as they are."""

    name: ClassVar[str] = "bf16"
    tiers: ClassVar[tuple[Tier, ...]] = (Tier.ANCHOR,)

    def encode_values(
        self, values: torch.Tensor, first_position: int = 0
    ) -> dict[Tier, torch.Tensor]:
        return {Tier.ANCHOR: raw.encode(values).flatten(1)}

    def decode_values(self, tiers: Sequence[torch.Tensor], first_position: int = 0) -> torch.Tensor:
        return raw.decode(self._vectors(tiers[0]), self.dtype)

    def _row_bytes(self, tier: Tier) -> int:
        return self.geometry.elements_per_token * self.dtype.itemsize

    def _encode_cpu(
        self,
        cache: PagedKVCache,
        slots: NDArray[np.int64],
        out: Mapping[Tier, Rows],
        first_position: int,
    ) -> None:
        rows = out[Tier.ANCHOR]
        words = rows.view(cache.bits(0).dtype)
        target = words if words.flags.aligned else np.empty_like(words)
        for layer in range(cache.num_layers):
            raw_cpu.encode_layer(cache, layer, slots, target)
        if target is not words:
            words[:] = target

    def _decode_cpu(
        self,
        tiers: Sequence[Rows],
        cache: PagedKVCache,
        slots: NDArray[np.int64],
        first_position: int,
    ) -> None:
        words = np.require(tiers[0].view(cache.bits(0).dtype), requirements="A")
        for layer in range(cache.num_layers):
            raw_cpu.decode_layer(cache, layer, slots, words)

    def encode_device(
        self,
        cache: PagedKVCache,
        slots: torch.Tensor,
        out: Mapping[Tier, torch.Tensor],
        first_position: int = 0,
    ) -> None:
        from lynx_kernels.raw import gpu as raw_gpu

        raw_gpu.encode(cache, slots, out[Tier.ANCHOR])

    def decode_device(
        self,
        tiers: Sequence[torch.Tensor],
        cache: PagedKVCache,
        slots: torch.Tensor,
        first_position: int = 0,
    ) -> None:
        from lynx_kernels.raw import gpu as raw_gpu

        raw_gpu.decode(cache, slots, tiers[0])
