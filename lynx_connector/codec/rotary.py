# SPDX-License-Identifier: Apache-2.0
"""Where K's rotation comes from. Not used yet: `klt` decorrelates K after RoPE."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rotary:
    """cos and sin as vLLM's module holds them: float32 [positions, rotary_dim / 2]."""

    cos: torch.Tensor
    sin: torch.Tensor
    is_neox: bool
