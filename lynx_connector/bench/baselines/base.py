# SPDX-License-Identifier: Apache-2.0
"""Codecs of the literature, as references to compare with: values in, values out.

They are never offered for serving: no kernels, no wire format, and some need state across tokens.
Their bits are computed, scales and zero points included.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

SCALE_BITS = 16
"""Scales and zero points are float16, as in the papers."""
_FLOAT16_MAX = 65504.0


@dataclass(frozen=True)
class Code:
    """Values after encoding.

    bits: size in bits, cumulative, one entry a tier (coarse first); data: the baseline's own.
    """

    bits: tuple[float, ...]
    data: Any


class Baseline(ABC):
    """One comparison codec. Values are float [T, L, 2, H, D], finite and within float16's range."""

    name: ClassVar[str]

    @abstractmethod
    def encode(self, values: torch.Tensor) -> Code:
        """Encode consecutive tokens."""

    @abstractmethod
    def decode(self, code: Code, tiers: int) -> torch.Tensor:
        """float32 [T, L, 2, H, D] from the first `tiers` tiers."""


@dataclass(frozen=True)
class MinMax:
    """Asymmetric integers per group: x = code * scale + zero, rounded to nearest.

    codes: float32, the values' shape; scale, zero: float32 (float16 values), broadcast to it.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor, dim: int, bits: int) -> MinMax:
        """One group along `dim` for each of the other coordinates."""
        top = 2**bits - 1
        low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
        zero = _float16(low)
        scale = _float16((high - zero) / top)
        codes = torch.where(scale > 0, (x - zero) / scale, 0.0).round().clamp(0, top)
        return cls(codes, scale, zero)

    def values(self) -> torch.Tensor:
        return self.codes * self.scale + self.zero

    @property
    def overhead_bits(self) -> int:
        """Bits of scales and zero points."""
        return SCALE_BITS * (self.scale.numel() + self.zero.numel())


def groups_per_channel(k: torch.Tensor, bits: int, group: int) -> list[MinMax]:
    """K [T, L, H, D]: one group per channel and `group` consecutive tokens; the last is shorter."""
    return [MinMax.of(part, 0, bits) for part in k.float().split(group, dim=0)]


def groups_per_token(v: torch.Tensor, bits: int, group: int) -> MinMax:
    """V [T, L, H, D]: one group per token, head and `group` channels, at most D."""
    size = min(group, v.shape[-1])
    if v.shape[-1] % size:
        size = v.shape[-1]
    return MinMax.of(v.float().unflatten(-1, (-1, size)), -1, bits)


def _float16(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-_FLOAT16_MAX, _FLOAT16_MAX).half().float()
