# SPDX-License-Identifier: Apache-2.0
"""Plain symmetric integer codec (int8, int4), torch reference: the baseline of the literature.

Per vector (token, layer, K or V, head): scale = absolute maximum / qmax, rounded up to bfloat16
(two bytes, little-endian) so that nothing clips, code = round half to even of x / scale. int8
codes are two's complement bytes; int4 codes are q + 8, two to a byte, the even element low.

A vector with a maximum below 2^-100 counts as zero (scale 0); one that holds NaN or infinity has
scale NaN and decodes to NaN throughout, without touching other vectors.
"""

from __future__ import annotations

import torch

QMAX = {8: 127, 4: 7}
TINY_BITS = (127 - 100) << 23  # float32 bits of 2^-100
INFINITY_BITS = 0x7F800000
NAN_SCALE = 0x7FC0


def encode(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors [..., D] -> codes uint8 [..., D * bits / 8], scales uint8 [..., 2]."""
    qmax = QMAX[bits]
    y = x.float()
    maximum = (y.view(torch.int32) & 0x7FFFFFFF).amax(dim=-1)
    step = (maximum.view(torch.float32) * _reciprocal(qmax)).view(torch.int32)
    scale = torch.where(maximum < TINY_BITS, 0, (step + 0xFFFF) >> 16)
    usable = (maximum >= TINY_BITS) & (maximum < INFINITY_BITS)
    scale = torch.where(maximum < INFINITY_BITS, scale, NAN_SCALE)
    inverse = torch.where(usable, 1 / _scale_value(scale), 0.0)
    q = torch.nan_to_num(y * inverse.unsqueeze(-1), nan=-float(qmax)).clamp(-qmax, qmax)
    code = q.round().to(torch.int32)
    codes = code & 0xFF if bits == 8 else _pack_nibbles(code + 8)
    scales = torch.stack((scale & 0xFF, scale >> 8), dim=-1)
    return codes.to(torch.uint8), scales.to(torch.uint8)


def decode(
    codes: torch.Tensor, scales: torch.Tensor, bits: int, dtype: torch.dtype
) -> torch.Tensor:
    """Inverse of `encode`: vectors [..., D] in `dtype`, saturated to its finite range."""
    if bits == 8:
        q = codes.view(torch.int8).float()
    else:
        q = torch.stack((codes & 0x0F, codes >> 4), dim=-1).flatten(-2).float() - 8
    scale = scales[..., 0].to(torch.int32) | (scales[..., 1].to(torch.int32) << 8)
    limit = torch.finfo(dtype).max
    return (q * _scale_value(scale).unsqueeze(-1)).clamp(-limit, limit).to(dtype)


def _pack_nibbles(nibbles: torch.Tensor) -> torch.Tensor:
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def _reciprocal(qmax: int) -> float:
    """1 / qmax in float32, a little large, so that the maximum's code is never above qmax."""
    return float(torch.nextafter(torch.tensor(1 / qmax), torch.tensor(1.0)))


def _scale_value(scale_bits: torch.Tensor) -> torch.Tensor:
    return (scale_bits.to(torch.int32) << 16).view(torch.float32)
