# SPDX-License-Identifier: Apache-2.0
"""QuantSpec's hierarchical cache: upper 4 bits to draft from, lower 4 bits that make them 8.

Tiwari et al., "QuantSpec: Self-Speculative Decoding with Hierarchical Quantized KV Cache", arXiv
2502.10424. Upper: asymmetric 4-bit integers rounded to nearest, K per channel, V per token. Lower:
the upper's error as a signed 4-bit integer in steps of a sixteenth, no scale of its own; 8-bit code
= 16 * upper + lower. Groups of 128 (V: at most one head). The paper's buffer of recent tokens in
full precision is not kept: here every codec gets the same exact tokens.

Bound: the upper tier errs by at most half a step, both by at most one sixteenth (an error of just
half a step has no code), plus what float16 loses of scale and zero point.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from lynx_connector.bench.baselines.base import (
    Baseline,
    Code,
    MinMax,
    groups_per_channel,
    groups_per_token,
)

GROUP = 128
BITS = 4
PARTS = 2**BITS


class QuantSpec(Baseline):
    name: ClassVar[str] = "quantspec-4+4"

    def encode(self, values: torch.Tensor) -> Code:
        keys, heads = values[:, :, 0].float(), values[:, :, 1].float()
        k, v = groups_per_channel(keys, BITS, GROUP), groups_per_token(heads, BITS, GROUP)
        k_low = [_lower(part, x) for part, x in zip(k, keys.split(GROUP), strict=True)]
        v_low = _lower(v, heads.reshape(v.codes.shape))
        upper = BITS * values.numel() + sum(part.overhead_bits for part in [*k, v])
        return Code((upper, upper + BITS * values.numel()), (k, k_low, v, v_low))

    def decode(self, code: Code, tiers: int) -> torch.Tensor:
        k, k_low, v, v_low = code.data
        keys = torch.cat([_value(*pair, tiers) for pair in zip(k, k_low, strict=True)])
        return torch.stack((keys, _value(v, v_low, tiers).flatten(-2)), dim=2)


def _lower(upper: MinMax, x: torch.Tensor) -> torch.Tensor:
    parts = torch.where(upper.scale > 0, (x - upper.values()) / upper.scale, 0.0) * PARTS
    return parts.round().clamp(-PARTS // 2, PARTS // 2 - 1)


def _value(upper: MinMax, lower: torch.Tensor, tiers: int) -> torch.Tensor:
    if tiers == 1:
        return upper.values()
    return (PARTS * upper.codes + lower) * (upper.scale / PARTS) + upper.zero
