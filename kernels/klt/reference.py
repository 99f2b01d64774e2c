# SPDX-License-Identifier: Apache-2.0
"""Codec `klt`, torch reference: K by a learned KLT before RoPE, V by mean and Hadamard transform.

A vector becomes D codes of static widths and one scale byte. The anchor holds the upper bits of
every code, the residual the rest, each as one little-endian string of bits in component order.

K: rotate back by the position, subtract the mean, transform (`analysis`), divide by the scale. A
component of `total` bits has the code floor((y + 2^total) / 2) of a y in (-2^total, 2^total); its
level is the middle of what its known bits leave, an integer. Basis and levels are integers whose
sums stay below 2^24, so their product is exact in float32 in any order (BLAS, FMA, TF32 tensor
cores); then come one multiplication, one addition and the rotation, each rounded. Hence the
reconstruction is the same bit for bit everywhere.

V: subtract the mean, then `hadamard`'s transform and scale with a code of 9 bits (16
cells of 32 parts); components with an odd number keep 8 of them. V spends one bit more than K,
whose energy the KLT has gathered: their relative errors are then about equal.

Scale bytes are those of `hadamard`; K's counts what one unit of `y / 2^total` is.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from lynx_kernels.hadamard import reference as hadamard
from lynx_kernels.shared.anchor_code import FineCode, fine_code
from lynx_kernels.shared.rotation import Rotation
from numpy.typing import NDArray

K_BITS, V_BITS = 7.5, 8.5
"""Bits of anchor and residual together, a component on average."""
MAX_WIDTH = 11
"""Bits of one K component at most."""


@dataclass(frozen=True)
class KltCode:
    """What encoding and decoding need of one model, as float32 and small integers.

    analysis: float32 [L, H, D, D], row i gives component i (in levels) of a centred K; basis:
    float32 [L, H, D, D], integers, row i is what one level of component i adds; k_unit: float32
    [L, H]; k_mean, v_mean: float32 [L, H, D]; anchor, total: int64 [L, 2, H, D], widths.
    """

    rotation: Rotation
    analysis: NDArray[np.float32]
    basis: NDArray[np.float32]
    k_unit: NDArray[np.float32]
    k_mean: NDArray[np.float32]
    v_mean: NDArray[np.float32]
    anchor: NDArray[np.int64]
    total: NDArray[np.int64]
    anchor_bits: int

    @property
    def head_dim(self) -> int:
        return self.k_mean.shape[-1]

    @functools.cached_property
    def lower(self) -> NDArray[np.int64]:
        """Bits of each component in the residual: int64 [L, 2, H, D]."""
        return self.total - self.anchor

    @functools.cached_property
    def fields(self) -> dict[str, BitFields]:
        """Where the bits of both tiers lie, by tier and K or V."""
        return {
            f"{tier} {kv}": BitFields(top[:, i], bottom[:, i])
            for i, kv in enumerate("kv")
            for tier, top, bottom in (
                ("anchor", self.total, self.lower),
                ("residual", self.lower, np.zeros_like(self.lower)),
            )
        }

    @property
    def fine(self) -> FineCode:
        """V's code."""
        return fine_code(self.head_dim)

    def v_levels(self, refined: bool) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """u by V's code, for even and odd components; by the anchor's code alone if not refined."""
        if refined:
            return self.fine.level9, self.fine.level8
        coarse = self.fine.anchor_level(self.anchor_bits)
        return coarse, coarse


def vector_bytes(head_dim: int, anchor_bits: int) -> tuple[int, int, int]:
    """Bytes of a vector's anchor (without its scale), and of its residual as K and as V."""
    k, v = (int(head_dim * (bits - anchor_bits)) // 8 for bits in (K_BITS, V_BITS))
    return head_dim * anchor_bits // 8, k, v


def v_widths(head_dim: int) -> NDArray[np.int64]:
    """Bits of each V component: int64 [D]."""
    return np.where(np.arange(head_dim) % 2, 8, 9)


@functools.cache
def scale_values() -> NDArray[np.float32]:
    """Value of each scale byte of K: float32 [256]; 0 for a K at the mean, NaN for none."""
    steps = (np.arange(256) - hadamard.SCALE_BIAS) / hadamard.STEPS_PER_OCTAVE
    values = np.exp2(steps).astype(np.float32)
    values[hadamard.SCALE_ZERO], values[hadamard.SCALE_NONFINITE] = 0, np.nan
    values.setflags(write=False)
    return values


@functools.cache
def scale_inverses() -> NDArray[np.float32]:
    """Reciprocals of `scale_values`; 0 for both special bytes."""
    with np.errstate(divide="ignore"):
        inverses = (np.float32(1) / scale_values()).astype(np.float32)
    inverses[[hadamard.SCALE_ZERO, hadamard.SCALE_NONFINITE]] = 0
    inverses.setflags(write=False)
    return inverses


def encode(code: KltCode, values: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """values [T, L, 2, H, D] at positions first and up -> rows of anchor and residual, uint8.

    Codes of K may differ from another implementation's by one where a sum was rounded otherwise.
    """
    device = values.device
    x = values.float()
    k = code.rotation.turn(x[:, :, 0], first, back=True) - _on(code.k_mean, device)
    y = torch.einsum("lhij,tlhj->tlhi", _on(code.analysis, device), k)
    span = _on(np.exp2(code.total[:, 0]).astype(np.float32), device)
    k_scale = _k_scales(y * (1 / span))
    level = y * _on(scale_inverses(), device)[k_scale.long()].unsqueeze(-1)
    k_code = torch.nan_to_num((level + span) * 0.5, nan=0.0).floor().clamp(min=0)
    k_code = torch.minimum(k_code, span - 1).to(torch.int32)

    tables = hadamard.hadamard_tables(code.head_dim)
    v = hadamard.walsh_hadamard(x[:, :, 1] - _on(code.v_mean, device), tables.transform)
    v_scale = hadamard.scale_codes(v, tables)
    to_grid = _on(2 * tables.to_grid, device)[v_scale.long()].unsqueeze(-1)
    middle = len(code.fine.code9_of_grid) // 2
    place = torch.nan_to_num(v * to_grid + middle, nan=0.0).clamp_(0, 2 * middle)
    v_code = _on(code.fine.code9_of_grid.astype(np.int32), device)[place.long()]
    v_code = v_code >> _on(9 - v_widths(code.head_dim), device)

    packed = [code.fields["anchor k"].pack(k_code), code.fields["anchor v"].pack(v_code)]
    scales = torch.stack((k_scale, v_scale), dim=2).flatten(1)
    anchor = torch.cat((torch.stack(packed, dim=2).flatten(1), scales), dim=1)
    rest = [code.fields["residual k"].pack(k_code), code.fields["residual v"].pack(v_code)]
    return anchor, torch.cat([part.flatten(2) for part in rest], dim=2).flatten(1)


def decode(
    code: KltCode,
    anchor: torch.Tensor,
    residual: torch.Tensor | None,
    first: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Inverse of `encode`, from the anchor alone where residual is None: [T, L, 2, H, D]."""
    device, tokens = anchor.device, len(anchor)
    layers, _, heads, head_dim = code.total.shape
    scale = anchor[:, -2 * layers * heads :].reshape(tokens, layers, 2, heads).long()
    upper = anchor[:, : -2 * layers * heads].reshape(tokens, layers, 2, heads, -1)
    k_code = code.fields["anchor k"].unpack(upper[:, :, 0])
    v_code = code.fields["anchor v"].unpack(upper[:, :, 1])
    lower, total = _on(code.lower, device), _on(code.total, device)
    if residual is None:
        level = k_code * 2 + (1 << lower[:, 0])
        v_code = v_code >> lower[:, 1]
    else:
        rest = residual.reshape(tokens, layers, -1)
        cut = heads * vector_bytes(head_dim, code.anchor_bits)[1]
        k_rest = rest[..., :cut].reshape(tokens, layers, heads, -1)
        v_rest = rest[..., cut:].reshape(tokens, layers, heads, -1)
        level = (k_code + code.fields["residual k"].unpack(k_rest)) * 2 + 1
        v_code = v_code + code.fields["residual v"].unpack(v_rest)
    level = level - (1 << total[:, 0])
    exact = torch.einsum("tlhi,lhid->tlhd", level.float(), _on(code.basis, device))
    factor = _on(code.k_unit, device) * _on(scale_values(), device)[scale[:, :, 0]]
    k = exact * factor.unsqueeze(-1) + _on(code.k_mean, device)

    tables = hadamard.hadamard_tables(head_dim)
    even, odd = (_on(levels, device) for levels in code.v_levels(residual is not None))
    u = torch.empty(v_code.shape, device=device)
    u[..., 0::2], u[..., 1::2] = even[v_code[..., 0::2]], odd[v_code[..., 1::2]]
    raw = u * _on(tables.to_raw, device)[scale[:, :, 1]].unsqueeze(-1)
    v = hadamard.walsh_hadamard(raw, tables.transform) + _on(code.v_mean, device)
    limit = torch.finfo(dtype).max
    return torch.stack((code.rotation.turn(k, first), v), dim=2).clamp(-limit, limit).to(dtype)


class BitFields:
    """Bits [bottom, top) of the codes of a vector, in a row: widths static a layer and head.

    top, bottom: int64 [L, H, D]; every vector has the same number of bits, a multiple of 8.
    """

    def __init__(self, top: NDArray[np.int64], bottom: NDArray[np.int64]) -> None:
        width = (top - bottom).reshape(-1, top.shape[-1])
        count = int(width[0].sum())
        element = np.stack([np.repeat(np.arange(top.shape[-1]), row) for row in width])
        start = np.take_along_axis(np.cumsum(width, axis=1) - width, element, axis=1)
        bit = np.arange(count) - start
        bit += np.take_along_axis(bottom.reshape(width.shape), element, axis=1)
        shape = (*top.shape[:2], count)
        self.element = torch.from_numpy(element.reshape(shape))
        self.bit = torch.from_numpy(bit.reshape(shape))
        self._head_dim = top.shape[-1]

    def pack(self, code: torch.Tensor) -> torch.Tensor:
        """Codes [T, L, H, D] -> uint8 [T, L, H, bytes]."""
        element = self.element.to(code.device).expand(len(code), *self.element.shape)
        bits = (code.gather(-1, element) >> self.bit.to(code.device)) & 1
        weights = 1 << torch.arange(8, device=code.device)
        return (bits.unflatten(-1, (-1, 8)) * weights).sum(-1).to(torch.uint8)

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """uint8 [T, L, H, bytes] -> int64 [T, L, H, D]; bits that are not here are zero."""
        places = torch.arange(8, device=packed.device)
        bits = ((packed.unsqueeze(-1) >> places) & 1).flatten(-2).long()
        element = self.element.to(packed.device).expand(bits.shape)
        code = torch.zeros((*packed.shape[:-1], self._head_dim), dtype=torch.int64)
        code = code.to(packed.device)
        return code.scatter_add_(-1, element, bits << self.bit.to(packed.device))


def _k_scales(relative: torch.Tensor) -> torch.Tensor:
    """Scale bytes [...] of components [..., D] in units of their range.

    Rounded up, so that nothing clips; 255 where that is not possible or a value is not finite.
    """
    maximum = (relative.view(torch.int32) & 0x7FFFFFFF).amax(dim=-1)
    mantissas = torch.tensor(hadamard.STEP_MANTISSAS, device=relative.device)
    steps = ((maximum & 0x7FFFFF).unsqueeze(-1) > mantissas).sum(dim=-1)
    code = ((maximum >> 23) - 127) * hadamard.STEPS_PER_OCTAVE + steps + hadamard.SCALE_BIAS
    code = torch.where(maximum < hadamard.TINY_BITS, hadamard.SCALE_ZERO, code.clamp(min=1))
    return code.clamp(max=hadamard.SCALE_NONFINITE).to(torch.uint8)


def _on(table: NDArray[np.generic], device: torch.device) -> torch.Tensor:
    return torch.tensor(table, device=device)
