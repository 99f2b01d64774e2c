# SPDX-License-Identifier: Apache-2.0
"""Codec `klt`, Triton: fused page -> tier rows and tier rows -> page, all layers in two launches.

`reference.py` explains the operations. Reconstructions are equal bit for bit; K's codes may differ
by one where a sum of the encoder was rounded otherwise.

A program takes ROWS tokens of one head, since the KLT is a matrix product with that head's basis:
on tensor cores when decoding, where levels (11 bits) and basis (10 bits) fit TF32 and every sum is
an exact integer, in float32 when encoding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
from lynx_kernels.hadamard.reference import hadamard_tables
from lynx_kernels.klt import reference as klt
from lynx_kernels.klt.gpu_decode import decode_k, decode_v
from lynx_kernels.klt.gpu_encode import encode_k, encode_v
from lynx_kernels.klt.reference import KltCode
from lynx_kernels.shared.paged import PagedKVCache
from lynx_kernels.shared.tiles_gpu import (
    OPTIONS,
    device_table,
    page_arguments,
)
from numpy.typing import NDArray

_TILE_ELEMENTS, _MAX_ROWS = 4096, 32
_CHUNK = 16  # components whose basis is in shared memory at once


@dataclass(frozen=True)
class KltDevice:
    """A `KltCode` as the kernels read it, on one device.

    analysis, basis: float32 [L, H, D, D], row i belongs to component i; mean: float32
    [L, 2, H, D]; unit: float32 [L, H]; span: float32 [L, H, D]; upper, lower: int32 [L, 2, H, D],
    bits in anchor and residual; their first bits in a vector's bytes: upper_start, lower_start;
    pair, partner: int32 [D], -1 and the element itself where nothing rotates; side: float32 [D],
    1 for the first element of a pair, -1 for the second. upper_map, lower_map: see `_map`; code9,
    fine_levels, coarse_levels: V's code, levels of even components before those of odd ones.
    """

    code: KltCode
    tables: dict[str, torch.Tensor]

    @classmethod
    def of(cls, code: KltCode, device: torch.device) -> KltDevice:
        d = code.head_dim
        pair, partner = np.full(d, -1, np.int32), np.arange(d, dtype=np.int32)
        side = np.ones(d, np.float32)
        one, two = code.rotation.elements
        pair[one] = pair[two] = np.arange(code.rotation.pairs)
        partner[one], partner[two], side[two] = two, one, -1
        arrays: dict[str, NDArray[Any]] = {
            "analysis": code.analysis,
            "basis": code.basis,
            "mean": np.stack((code.k_mean, code.v_mean), axis=1),
            "unit": code.k_unit,
            "span": np.exp2(code.total[:, 0]).astype(np.float32),
            "upper": code.anchor.astype(np.int32),
            "upper_start": _starts(code.anchor),
            "lower": code.lower.astype(np.int32),
            "lower_start": _starts(code.lower),
            "upper_map": _map(code, "anchor"),
            "lower_map": _map(code, "residual"),
            "code9": code.fine.code9_of_grid.astype(np.int32),
            "fine_levels": np.concatenate(code.v_levels(True)),
            "coarse_levels": np.concatenate(code.v_levels(False)),
            "pair": pair,
            "partner": partner,
            "side": side,
        }
        return cls(
            code,
            {k: torch.tensor(np.ascontiguousarray(v), device=device) for k, v in arrays.items()},
        )


def encode(
    cache: PagedKVCache,
    slots: torch.Tensor,
    layers: KltDevice,
    anchor: torch.Tensor,
    residual: torch.Tensor,
    first_position: int,
) -> None:
    """Encode K and V at `slots` into tier rows, C-contiguous uint8 [T, bytes], on the device."""
    code = layers.code
    tables = hadamard_tables(cache.head_dim)
    common = _arguments(cache, slots, layers, anchor, residual)
    common |= {name: layers.tables[name] for name in ("upper_map", "lower_map")}
    names = ("analysis", "span", "pair", "partner", "side")
    grid = _grid(cache, slots)
    encode_k[grid](
        **common,
        **{name: layers.tables[name] for name in names},
        **_angles(code, first_position, len(slots), cache.device),
        inverses=device_table(klt.scale_inverses(), cache.device),
        **OPTIONS,
    )
    encode_v[grid](
        **common,
        norm=float(tables.norm),
        to_grid=device_table(tables.to_grid, cache.device),
        code9=layers.tables["code9"],
        STAGES=tables.transform.bit_length() - 1,
        **OPTIONS,
    )


def decode(
    cache: PagedKVCache,
    slots: torch.Tensor,
    layers: KltDevice,
    anchor: torch.Tensor,
    residual: torch.Tensor | None,
    first_position: int,
) -> None:
    """Write K and V at `slots`, which must not repeat, from the anchor and, if given, residual."""
    code = layers.code
    tables = hadamard_tables(cache.head_dim)
    refined = residual is not None
    common = _arguments(cache, slots, layers, anchor, anchor if residual is None else residual)
    common |= {name: layers.tables[name] for name in ("upper", "upper_start", "lower_start")}
    common |= {"lower": layers.tables["lower"], "REFINED": refined}
    names = ("basis", "unit", "span", "pair", "partner", "side")
    grid = _grid(cache, slots)
    decode_k[grid](
        **common,
        **{name: layers.tables[name] for name in names},
        **_angles(code, first_position, len(slots), cache.device),
        values=device_table(klt.scale_values(), cache.device),
        **OPTIONS,
    )
    decode_v[grid](
        **common,
        to_raw=device_table(tables.to_raw, cache.device),
        levels=layers.tables["fine_levels" if refined else "coarse_levels"],
        num_even=len(code.v_levels(refined)[0]),
        STAGES=tables.transform.bit_length() - 1,
        **OPTIONS,
    )


def _grid(cache: PagedKVCache, slots: torch.Tensor) -> tuple[int, int, int]:
    return max(1, triton.cdiv(len(slots), _rows(cache))), cache.num_kv_heads, cache.num_layers


def _rows(cache: PagedKVCache) -> int:
    return min(_MAX_ROWS, _TILE_ELEMENTS // triton.next_power_of_2(cache.head_dim))


def _arguments(
    cache: PagedKVCache,
    slots: torch.Tensor,
    layers: KltDevice,
    anchor: torch.Tensor,
    residual: torch.Tensor,
) -> dict[str, Any]:
    upper, k_bytes, v_bytes = klt.vector_bytes(cache.head_dim, layers.code.anchor_bits)
    return page_arguments(cache, slots) | {
        "mean": layers.tables["mean"],
        "anchor": anchor,
        "anchor_pitch": anchor.stride(0),
        "residual": residual,
        "residual_pitch": residual.stride(0),
        "UPPER_BYTES": upper,
        "K_BYTES": k_bytes,
        "V_BYTES": v_bytes,
        "ROWS": _rows(cache),
        "CHUNK": _CHUNK,
    }


def _angles(code: KltCode, first: int, tokens: int, device: torch.device) -> dict[str, Any]:
    """cos and sin, float32 [T, pairs] each."""
    cos, sin = code.rotation.cos_sin(first, tokens)
    tables = {"cos": cos, "sin": sin}
    arguments: dict[str, Any] = {
        name: torch.from_numpy(np.ascontiguousarray(table.T)).to(device)
        for name, table in tables.items()
    }
    return arguments | {"PAIRS": code.rotation.pairs}


def _starts(width: NDArray[np.int64]) -> NDArray[np.int32]:
    return (np.cumsum(width, axis=-1) - width).astype(np.int32)


def _map(code: KltCode, tier: str) -> NDArray[np.int32]:
    """Where each bit of a vector's bytes comes from: element * 16 + bit, int32 [L, 2, H, D * 8].

    Rows of K and V have different lengths; what lies behind one is never read.
    """
    source = np.zeros((*code.total.shape[:3], 8 * code.head_dim), np.int32)
    for i, kv in enumerate("kv"):
        field = code.fields[f"{tier} {kv}"]
        number = field.element.numpy() * 16 + field.bit.numpy()
        source[:, i, :, : number.shape[-1]] = number
    return source
