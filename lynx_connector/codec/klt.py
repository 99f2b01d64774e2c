# SPDX-License-Identifier: Apache-2.0
"""Learned tables: K by a KLT per head with static component widths, V by mean and Hadamard.

anchor: D * anchor_bits / 8 bytes a vector, all vectors, then one scale byte a vector; residual: the
other D * (8 - anchor_bits) / 8 bytes. A K component of width w has a code of w + 4 bits, a V
coefficient the 8-bit code of `lynx_kernels.hadamard`; the anchor holds the upper bits of each code.

Reconstruction of K: codes and basis are integers whose sums stay below 2^24, so the product is
exact in float32 in any order; then one multiplication and one addition.

Torch throughout, on every device: correct, not fast. There are no kernels for it yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from lynx_kernels import hadamard
from lynx_kernels.anchor_code import anchor_code
from lynx_kernels.paged import PagedKVCache
from numpy.typing import NDArray

from lynx_connector.codec.base import Codec, CodecError, KVGeometry, Rows, Tier
from lynx_connector.codec.klt_tables import ANCHOR_BITS, MAX_WIDTH, KltTables

_CODE_BITS = MAX_WIDTH + 4
_TOKENS = 64  # at once, to bound the scratch memory


class KltCodec(Codec):
    """Needs tables; anchor_bits is 3, 4 or 5. head_dim must be a multiple of 8."""

    name: ClassVar[str] = "klt"
    tiers: ClassVar[tuple[Tier, ...]] = (Tier.ANCHOR, Tier.RESIDUAL)

    def __init__(self, geometry: KVGeometry, tables: KltTables | None, anchor_bits: int) -> None:
        super().__init__(geometry)
        if geometry.head_dim % 8:
            raise CodecError(
                f"codec {self.name}: head_dim {geometry.head_dim} is not a multiple of 8"
            )
        if anchor_bits not in ANCHOR_BITS:
            raise CodecError(f"codec {self.name}: anchor_bits {anchor_bits} is not 3, 4 or 5")
        if tables is None:
            raise CodecError(f"codec {self.name}: needs tables, and none have been learned")
        self.tables, self.anchor_bits = tables, anchor_bits
        self._widths = self.row_widths(geometry, anchor_bits)
        self._scales = geometry.vectors_per_token
        g, d = geometry, geometry.head_dim
        total = np.full((g.num_layers, 2, g.num_kv_heads, d), 8, dtype=np.int64)
        total[:, 0] = tables.widths[1].astype(np.int64) + 4
        upper = np.full_like(total, anchor_bits)
        upper[:, 0] = tables.widths[ANCHOR_BITS.index(anchor_bits)]
        self._lower = torch.from_numpy(total - upper)
        self._anchor_bits = _BitList(total, total - upper)
        self._residual_bits = _BitList(total - upper, np.zeros_like(total))
        basis = torch.from_numpy(tables.k_basis.astype(np.float32))
        self._basis = basis
        self._inverse = torch.linalg.pinv(basis.double()).float()
        self._range = torch.from_numpy(np.exp2(total[:, 0]).astype(np.float32))
        self._unit = torch.from_numpy(np.array(tables.k_unit))
        self._k_mean = torch.from_numpy(np.array(tables.k_mean))
        self._v_mean = torch.from_numpy(np.array(tables.v_mean))
        self._factor = torch.from_numpy(_scale_values())
        code = anchor_code(d)
        cell = torch.tensor(code.refined_level).reshape(1 << anchor_bits, -1).mean(dim=1)
        self._v_coarse = torch.tensor(code.anchor_level) if anchor_bits == 4 else cell
        self._v_fine = torch.tensor(code.refined_level)

    @classmethod
    def row_widths(cls, geometry: KVGeometry, anchor_bits: int) -> dict[Tier, int]:
        """Bytes of a token's row by tier; tables do not matter."""
        elements = geometry.elements_per_token
        return {
            Tier.ANCHOR: elements * anchor_bits // 8 + geometry.vectors_per_token,
            Tier.RESIDUAL: elements * (8 - anchor_bits) // 8,
        }

    def exceptions(self, anchor: Rows) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        token, vector = np.nonzero(anchor[:, -self._scales :] == hadamard.SCALE_NONFINITE)
        return token, vector

    def error_spread(self, anchor: Rows) -> NDArray[np.int16]:
        return anchor[:, -self._scales :].astype(np.int16) - np.int16(hadamard.SCALE_BIAS)

    def warmup(self, cache: PagedKVCache | None = None) -> None:
        """Nothing to compile."""

    def encode_values(
        self, values: torch.Tensor, first_position: int = 0
    ) -> dict[Tier, torch.Tensor]:
        parts = [self._encode(part) for part in values.split(_TOKENS)]
        if not parts:
            return {
                tier: torch.zeros((0, width), dtype=torch.uint8)
                for tier, width in self._widths.items()
            }
        return {tier: torch.cat([part[tier] for part in parts]) for tier in self.tiers}

    def _encode(self, values: torch.Tensor) -> dict[Tier, torch.Tensor]:
        x = values.float()
        coefficients = torch.einsum("tlhd,lhdi->tlhi", x[:, :, 0] - self._k_mean, self._inverse)
        coefficients = coefficients / self._unit.unsqueeze(-1)
        k_scale = _scale_codes((coefficients.abs() / self._range).amax(dim=-1))
        inverse = torch.where((k_scale > 0) & (k_scale < 255), 1 / self._factor[k_scale.long()], 0)
        levels = torch.nan_to_num(coefficients * inverse.unsqueeze(-1), nan=0.0)
        k_code = torch.floor((levels + self._range) / 2).clamp(min=0)
        k_code = torch.minimum(k_code, self._range - 1).to(torch.int32)
        anchor, v_scale, residual = hadamard.encode(x[:, :, 1] - self._v_mean)
        even = ((anchor & 0x0F) << 4) | (residual & 0x0F)
        odd = (anchor & 0xF0) | (residual >> 4)
        v_code = torch.stack((even, odd), dim=-1).flatten(-2).to(torch.int32)
        code = torch.stack((k_code, v_code), dim=2)
        scale = torch.stack((k_scale, v_scale), dim=2).flatten(1)
        packed = self._anchor_bits.pack(code).flatten(1)
        return {
            Tier.ANCHOR: torch.cat((packed, scale), dim=1),
            Tier.RESIDUAL: self._residual_bits.pack(code).flatten(1),
        }

    def decode_values(self, tiers: Sequence[torch.Tensor], first_position: int = 0) -> torch.Tensor:
        g = self.geometry
        parts = [
            self._decode([rows[start : start + _TOKENS] for rows in tiers])
            for start in range(0, len(tiers[0]), _TOKENS)
        ]
        shape = (0, g.num_layers, 2, g.num_kv_heads, g.head_dim)
        return torch.cat(parts) if parts else torch.zeros(shape, dtype=self.dtype)

    def _decode(self, tiers: Sequence[torch.Tensor]) -> torch.Tensor:
        scale = self._vectors(tiers[0][:, -self._scales :]).squeeze(-1).long()
        code = self._anchor_bits.unpack(self._vectors(tiers[0][:, : -self._scales]))
        if len(tiers) == 2:
            code = code + self._residual_bits.unpack(self._vectors(tiers[1]))
            level = 2 * code[:, :, 0] + 1 - self._range
            v = self._v_fine[code[:, :, 1].long()]
        else:  # the middle of the cell that the upper bits leave
            lower = self._lower[:, 0]
            level = 2 * code[:, :, 0] + torch.exp2(lower.float()) - self._range
            v = self._v_coarse[(code[:, :, 1] >> self._lower[:, 1]).long()]
        exact = torch.einsum("tlhi,lhid->tlhd", level.float(), self._basis)
        factor = self._unit * self._factor[scale[:, :, 0]]
        k = exact * factor.unsqueeze(-1) + self._k_mean
        tables = hadamard.hadamard_tables(self.geometry.head_dim)
        raw = v * torch.tensor(tables.to_raw)[scale[:, :, 1]].unsqueeze(-1)
        v = hadamard.walsh_hadamard(raw, tables.transform) + self._v_mean
        limit = torch.finfo(self.dtype).max
        return torch.stack((k, v), dim=2).clamp(-limit, limit).to(self.dtype)

    def _row_bytes(self, tier: Tier) -> int:
        return self._widths[tier]

    def _encode_cpu(
        self,
        cache: PagedKVCache,
        slots: NDArray[np.int64],
        out: Mapping[Tier, Rows],
        first_position: int,
    ) -> None:
        for start in range(0, len(slots), _TOKENS):
            part = slice(start, start + _TOKENS)
            values = [cache.gather(layer, slots[part]) for layer in range(cache.num_layers)]
            for tier, rows in self._encode(torch.stack(values, dim=1)).items():
                out[tier][part] = rows.numpy()

    def _decode_cpu(
        self,
        tiers: Sequence[Rows],
        cache: PagedKVCache,
        slots: NDArray[np.int64],
        first_position: int,
    ) -> None:
        for start in range(0, len(slots), _TOKENS):
            part = slice(start, start + _TOKENS)
            values = self._decode([torch.from_numpy(rows[part].copy()) for rows in tiers])
            for layer in range(cache.num_layers):
                cache.scatter(layer, slots[part], values[:, layer])


class _BitList:
    """Which bits of which codes make up a tier's bytes: bits [bottom, top) of every code."""

    def __init__(self, top: NDArray[np.int64], bottom: NDArray[np.int64]) -> None:
        shape = top.shape
        count = int((top - bottom)[0, 0, 0].sum())
        element = np.zeros((*shape[:-1], count), dtype=np.int64)
        bit = np.zeros_like(element)
        place = np.full((*shape, _CODE_BITS), count, dtype=np.int64)  # `count` holds a zero
        for vector in np.ndindex(*shape[:-1]):
            width = (top - bottom)[vector]
            element[vector] = np.repeat(np.arange(shape[-1]), width)
            starts = np.cumsum(width) - width
            within = np.arange(count) - np.repeat(starts, width)
            bit[vector] = within + np.repeat(bottom[vector], width)
            place[vector][element[vector], bit[vector]] = np.arange(count)
        self._element, self._bit, self._place = map(torch.from_numpy, (element, bit, place))
        self._weights = 1 << torch.arange(8)

    def pack(self, code: torch.Tensor) -> torch.Tensor:
        """Codes int32 [T, L, 2, H, D] -> uint8 [T, L, 2, H, bytes]."""
        bits = code.gather(-1, self._element.expand(len(code), *self._element.shape))
        bits = (bits >> self._bit) & 1
        return (bits.unflatten(-1, (-1, 8)) * self._weights).sum(-1).to(torch.uint8)

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """Inverse of `pack`; bits that this tier lacks are zero."""
        bits = ((packed.unsqueeze(-1) >> torch.arange(8)) & 1).flatten(-2)
        bits = torch.nn.functional.pad(bits, (0, 1)).to(torch.int32)
        code = torch.zeros((*packed.shape[:-1], self._place.shape[-2]), dtype=torch.int32)
        for bit in range(_CODE_BITS):
            place = self._place[..., bit]
            code += bits.gather(-1, place.expand(len(packed), *place.shape)) << bit
        return code


def _scale_values() -> NDArray[np.float32]:
    steps = (np.arange(256) - hadamard.SCALE_BIAS) / hadamard.STEPS_PER_OCTAVE
    values = np.exp2(steps).astype(np.float32)
    values[hadamard.SCALE_ZERO], values[hadamard.SCALE_NONFINITE] = 0, np.nan
    return values


def _scale_codes(maximum: torch.Tensor) -> torch.Tensor:
    """Scale bytes, rounded up so that nothing clips; 255 where the maximum is not finite."""
    steps = torch.ceil(torch.log2(maximum) * hadamard.STEPS_PER_OCTAVE) + hadamard.SCALE_BIAS
    code = steps.clamp(hadamard.SCALE_MIN, hadamard.SCALE_MAX)
    code = torch.where(steps < hadamard.SCALE_MIN, hadamard.SCALE_ZERO, code)
    code = torch.where(maximum.isfinite(), code, hadamard.SCALE_NONFINITE)
    return code.to(torch.uint8)
