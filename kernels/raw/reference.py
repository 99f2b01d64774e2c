# SPDX-License-Identifier: Apache-2.0
"""Unchanged KV: the cache's own bits, token by token.

A row is [L, 2, H, D] in the cache's dtype, as bytes of a little-endian machine.
"""

from __future__ import annotations

import torch


def encode(x: torch.Tensor) -> torch.Tensor:
    """Vectors [..., D] -> uint8 [..., D * itemsize]."""
    return x.contiguous().view(torch.uint8)


def decode(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Inverse of `encode`: [..., D] in `dtype`."""
    return codes.contiguous().view(dtype)
