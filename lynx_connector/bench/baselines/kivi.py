# SPDX-License-Identifier: Apache-2.0
"""KIVI: K per channel in groups of tokens, V per token, asymmetric integers.

Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", arXiv 2402.02750. The
paper's setting is 2 bits in groups of 32. Its window of 128 recent tokens in full precision is not
kept: here every codec gets the same exact tokens.

Bound: an element's error is at most half its group's step, plus what float16 loses of the scale
and of the zero point. A group of K spans tokens, so that a block of 16 tokens does not stand alone.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from lynx_connector.bench.baselines.base import (
    Baseline,
    Code,
    groups_per_channel,
    groups_per_token,
)


class Kivi(Baseline):
    """One tier; `bits` per code, one scale and one zero point per `group` elements."""

    bits: ClassVar[int]
    group: ClassVar[int]

    def encode(self, values: torch.Tensor) -> Code:
        k = groups_per_channel(values[:, :, 0], self.bits, self.group)
        v = groups_per_token(values[:, :, 1], self.bits, self.group)
        overhead = sum(part.overhead_bits for part in [*k, v])
        return Code((self.bits * values.numel() + overhead,), (k, v))

    def decode(self, code: Code, tiers: int) -> torch.Tensor:
        k, v = code.data
        keys = torch.cat([part.values() for part in k])
        return torch.stack((keys, v.values().flatten(-2)), dim=2)


class Kivi4(Kivi):
    name: ClassVar[str] = "kivi-4bit-g64"
    bits: ClassVar[int] = 4
    group: ClassVar[int] = 64


class Kivi2(Kivi):
    name: ClassVar[str] = "kivi-2bit-g32"
    bits: ClassVar[int] = 2
    group: ClassVar[int] = 32
