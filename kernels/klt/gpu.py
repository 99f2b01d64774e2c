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
import triton.language as tl
from lynx_kernels.hadamard import reference as hadamard
from lynx_kernels.hadamard.gpu import scale_codes, walsh_hadamard
from lynx_kernels.hadamard.reference import hadamard_tables
from lynx_kernels.klt import reference as klt
from lynx_kernels.klt.reference import KltCode
from lynx_kernels.shared.paged import PagedKVCache
from lynx_kernels.shared.tiles_gpu import (
    FLOAT32,
    MAGNITUDE,
    OPTIONS,
    device_table,
    from_single,
    page_arguments,
    to_single,
)
from numpy.typing import NDArray

_TILE_ELEMENTS, _MAX_ROWS = 4096, 32
_CHUNK = 16  # components whose basis is in shared memory at once

_STEP_MANTISSAS = tl.constexpr(tuple(int(mantissa) for mantissa in hadamard.STEP_MANTISSAS))
_STEPS = tl.constexpr(hadamard.STEPS_PER_OCTAVE)
_BIAS = tl.constexpr(hadamard.SCALE_BIAS)
_TINY = tl.constexpr(hadamard.TINY_BITS)
_V_MIDDLE = tl.constexpr(8192.0)
_V_LAST = tl.constexpr(16384.0)


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
    _encode_k[grid](
        **common,
        **{name: layers.tables[name] for name in names},
        **_angles(code, first_position, len(slots), cache.device),
        inverses=device_table(klt.scale_inverses(), cache.device),
        **OPTIONS,
    )
    _encode_v[grid](
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
    _decode_k[grid](
        **common,
        **{name: layers.tables[name] for name in names},
        **_angles(code, first_position, len(slots), cache.device),
        values=device_table(klt.scale_values(), cache.device),
        **OPTIONS,
    )
    _decode_v[grid](
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


@triton.jit
def _tokens(num_tokens, ROWS: tl.constexpr):
    """Tokens of the tile int32 [ROWS], and which of them exist."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    return token, token < num_tokens


@triton.jit
def _elements(
    layers,
    slots,
    index,
    num_tokens,
    stride_block,
    stride_head,
    stride_token,
    d,
    KV: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KIND: tl.constexpr,
    IN_ROWS: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Pointers to elements d [1, n] of the tile's vectors, and which of them exist."""
    token, valid = _tokens(num_tokens, ROWS)
    slot = tl.load(slots + token, mask=valid, other=0)
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    page = block * stride_block + tl.program_id(1) * stride_head
    mask = valid[:, None] & (d < HEAD_DIM)
    if IN_ROWS:
        inside = (offset * stride_token + KV * HEAD_DIM)[:, None] + d
    else:
        first = (KV * BLOCK_SIZE + offset) * HEAD_DIM
        inside = tl.load(index + first[:, None] + d, mask=mask, other=0)
    address = tl.load(layers + tl.program_id(2))
    if KIND == FLOAT32:
        base = address.to(tl.pointer_type(tl.uint32))
    else:
        base = address.to(tl.pointer_type(tl.uint16))
    if ALIGNED:
        base = tl.multiple_of(base, 16)
    return base + (page[:, None] + inside), mask


@triton.jit
def _vector(KV: tl.constexpr, HEADS: tl.constexpr):
    """Number of the program's vector among those of a token."""
    return (tl.program_id(2) * 2 + KV) * HEADS + tl.program_id(1)


@triton.jit
def _rows_of(
    rows,
    pitch,
    num_tokens,
    KV: tl.constexpr,
    IS_ANCHOR: tl.constexpr,
    HEADS: tl.constexpr,
    UPPER_BYTES: tl.constexpr,
    K_BYTES: tl.constexpr,
    V_BYTES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Pointers [ROWS] to the first byte of the program's vectors in a tier."""
    token, _ = _tokens(num_tokens, ROWS)
    if IS_ANCHOR:
        column = _vector(KV, HEADS) * UPPER_BYTES
    elif KV == 0:
        column = tl.program_id(2) * (HEADS * (K_BYTES + V_BYTES)) + tl.program_id(1) * K_BYTES
    else:
        column = tl.program_id(2) * (HEADS * (K_BYTES + V_BYTES)) + HEADS * K_BYTES
        column += tl.program_id(1) * V_BYTES
    return rows + token.to(tl.int64) * pitch + column


@triton.jit
def _scales_of(
    anchor,
    pitch,
    num_tokens,
    KV: tl.constexpr,
    HEADS: tl.constexpr,
    UPPER_BYTES: tl.constexpr,
    ROWS: tl.constexpr,
):
    token, _ = _tokens(num_tokens, ROWS)
    column = tl.num_programs(2) * (2 * HEADS * UPPER_BYTES) + _vector(KV, HEADS)
    return anchor + token.to(tl.int64) * pitch + column


@triton.jit
def _put(
    code,
    source,
    place,
    num_tokens,
    KV: tl.constexpr,
    BYTES: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Pack codes int32 [ROWS, DIM] into BYTES bytes a vector; source: see `_map`."""
    _, valid = _tokens(num_tokens, ROWS)
    j = tl.arange(0, DIM)[None, :]
    source += _vector(KV, HEADS) * (8 * HEAD_DIM)
    byte = tl.zeros((ROWS, DIM), tl.int32)
    for bit in range(8):  # a loop: unrolled it takes most of a minute to compile
        number = tl.load(source + j * 8 + bit, mask=j < BYTES, other=0)
        number = tl.broadcast_to(number, (ROWS, DIM))
        byte |= ((tl.gather(code, number >> 4, 1) >> (number & 15)) & 1) << bit
    mask = valid[:, None] & (j < BYTES)
    tl.store(place[:, None] + j, byte.to(tl.uint8), mask=mask)


@triton.jit
def _get(
    place,
    start,
    width,
    d,
    num_tokens,
    KV: tl.constexpr,
    BYTES: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Fields int32 [ROWS, n] of components d [1, n]: at most 11 bits, hence in three bytes."""
    _, valid = _tokens(num_tokens, ROWS)
    table = _vector(KV, HEADS) * HEAD_DIM + d
    first = tl.load(start + table, mask=d < HEAD_DIM, other=0)
    bits = tl.load(width + table, mask=d < HEAD_DIM, other=0)
    word = tl.zeros((ROWS, d.shape[1]), tl.int32)
    for byte in tl.static_range(3):
        at = (first >> 3) + byte
        there = valid[:, None] & (at < BYTES)
        word |= tl.load(place[:, None] + at, mask=there, other=0).to(tl.int32) << (8 * byte)
    return (word >> (first & 7)) & ((1 << bits) - 1)


@triton.jit
def _turned(
    x,
    other,
    cos,
    sin,
    pair,
    side,
    d,
    num_tokens,
    SIGN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """x [ROWS, n], elements d, rotated (SIGN -1) or rotated back (1); other: their partners."""
    token, valid = _tokens(num_tokens, ROWS)
    number = tl.load(pair + d, mask=d < HEAD_DIM, other=-1)
    sign = SIGN * tl.load(side + d, mask=d < HEAD_DIM, other=1.0)
    mask = valid[:, None] & (number >= 0)
    at = token.to(tl.int64)[:, None] * PAIRS + number
    c, s = tl.load(cos + at, mask=mask, other=1.0), tl.load(sin + at, mask=mask, other=0.0)
    return tl.where(number >= 0, x * c + (other * s) * sign, x)


@triton.jit(do_not_specialize=["num_tokens"])
def _encode_k(
    layers,
    slots,
    index,
    num_tokens,
    stride_block,
    stride_head,
    stride_token,
    mean,
    anchor,
    anchor_pitch,
    residual,
    residual_pitch,
    upper_map,
    lower_map,
    analysis,
    span,
    pair,
    partner,
    side,
    cos,
    sin,
    inverses,
    PAIRS: tl.constexpr,
    UPPER_BYTES: tl.constexpr,
    K_BYTES: tl.constexpr,
    V_BYTES: tl.constexpr,
    CHUNK: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KIND: tl.constexpr,
    IN_ROWS: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
):
    head = tl.program_id(2) * HEADS + tl.program_id(1)
    i = tl.arange(0, DIM)[None, :]
    y = tl.zeros((ROWS, DIM), tl.float32)
    for start in range(0, HEAD_DIM, CHUNK):
        d = start + tl.arange(0, CHUNK)[None, :]
        here, mask = _elements(
            layers, slots, index, num_tokens, stride_block, stride_head, stride_token, d,
            0, HEAD_DIM, BLOCK_SIZE, KIND, IN_ROWS, ALIGNED, ROWS,
        )  # fmt: skip
        other, _ = _elements(
            layers, slots, index, num_tokens, stride_block, stride_head, stride_token,
            tl.load(partner + d), 0, HEAD_DIM, BLOCK_SIZE, KIND, IN_ROWS, ALIGNED, ROWS,
        )  # fmt: skip
        x = _turned(
            to_single(tl.load(here, mask=mask, other=0), KIND),
            to_single(tl.load(other, mask=mask, other=0), KIND),
            cos, sin, pair, side, d, num_tokens, 1, HEAD_DIM, PAIRS, ROWS,
        )  # fmt: skip
        x -= tl.load(mean + _vector(0, HEADS) * HEAD_DIM + d)
        column = start + tl.arange(0, CHUNK)[:, None]
        rows = analysis + (head * HEAD_DIM + i) * HEAD_DIM + column
        y = tl.dot(x, tl.load(rows, mask=i < HEAD_DIM, other=0.0), y, input_precision="ieee")
    wide = tl.load(span + head * HEAD_DIM + i, mask=i < HEAD_DIM, other=1.0)
    relative = y * tl.div_rn(1.0, wide)
    largest = tl.max(relative.to(tl.int32, bitcast=True) & MAGNITUDE, axis=1)
    scale = ((largest >> 23) - 127) * _STEPS + _BIAS
    for step in tl.static_range(_STEPS):
        scale += ((largest & 0x7FFFFF) > _STEP_MANTISSAS[step]).to(tl.int32)
    scale = tl.where(largest < _TINY, 0, tl.maximum(scale, 1))
    scale = tl.minimum(scale, 255)
    level = (y * tl.load(inverses + scale)[:, None] + wide) * 0.5
    level = tl.where(level > 0.0, level, 0.0)  # NaN too
    code = tl.where(level < wide - 1, level, wide - 1).to(tl.int32)
    place = _rows_of(
        anchor, anchor_pitch, num_tokens, 0, True, HEADS, UPPER_BYTES, K_BYTES, V_BYTES, ROWS
    )
    _put(code, upper_map, place, num_tokens, 0, UPPER_BYTES, HEADS, HEAD_DIM, DIM, ROWS)
    place = _rows_of(
        residual, residual_pitch, num_tokens, 0, False, HEADS, UPPER_BYTES, K_BYTES, V_BYTES, ROWS
    )
    _put(code, lower_map, place, num_tokens, 0, K_BYTES, HEADS, HEAD_DIM, DIM, ROWS)
    scales = _scales_of(anchor, anchor_pitch, num_tokens, 0, HEADS, UPPER_BYTES, ROWS)
    _, valid = _tokens(num_tokens, ROWS)
    tl.store(scales, scale.to(tl.uint8), mask=valid)


@triton.jit(do_not_specialize=["num_tokens"])
def _encode_v(
    layers,
    slots,
    index,
    num_tokens,
    stride_block,
    stride_head,
    stride_token,
    mean,
    anchor,
    anchor_pitch,
    residual,
    residual_pitch,
    upper_map,
    lower_map,
    norm,
    to_grid,
    code9,
    STAGES: tl.constexpr,
    UPPER_BYTES: tl.constexpr,
    K_BYTES: tl.constexpr,
    V_BYTES: tl.constexpr,
    CHUNK: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KIND: tl.constexpr,
    IN_ROWS: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
):
    d = tl.arange(0, DIM)[None, :]
    here, mask = _elements(
        layers, slots, index, num_tokens, stride_block, stride_head, stride_token, d,
        1, HEAD_DIM, BLOCK_SIZE, KIND, IN_ROWS, ALIGNED, ROWS,
    )  # fmt: skip
    x = to_single(tl.load(here, mask=mask, other=0), KIND)
    x -= tl.load(mean + _vector(1, HEADS) * HEAD_DIM + d, mask=d < HEAD_DIM, other=0.0)
    v = walsh_hadamard(x, STAGES)
    scale = scale_codes(v, norm)
    position = v * (2 * tl.load(to_grid + scale))[:, None] + _V_MIDDLE
    position = tl.where(position > 0.0, position, 0.0)  # NaN too
    position = tl.where(position < _V_LAST, position, _V_LAST)
    code = tl.load(code9 + position.to(tl.int32)) >> (d & 1)
    place = _rows_of(
        anchor, anchor_pitch, num_tokens, 1, True, HEADS, UPPER_BYTES, K_BYTES, V_BYTES, ROWS
    )
    _put(code, upper_map, place, num_tokens, 1, UPPER_BYTES, HEADS, HEAD_DIM, DIM, ROWS)
    place = _rows_of(
        residual, residual_pitch, num_tokens, 1, False, HEADS, UPPER_BYTES, K_BYTES, V_BYTES, ROWS
    )
    _put(code, lower_map, place, num_tokens, 1, V_BYTES, HEADS, HEAD_DIM, DIM, ROWS)
    scales = _scales_of(anchor, anchor_pitch, num_tokens, 1, HEADS, UPPER_BYTES, ROWS)
    _, valid = _tokens(num_tokens, ROWS)
    tl.store(scales, scale.to(tl.uint8), mask=valid)


@triton.jit(do_not_specialize=["num_tokens"])
def _decode_k(
    layers,
    slots,
    index,
    num_tokens,
    stride_block,
    stride_head,
    stride_token,
    mean,
    anchor,
    anchor_pitch,
    residual,
    residual_pitch,
    upper,
    upper_start,
    lower,
    lower_start,
    basis,
    unit,
    span,
    pair,
    partner,
    side,
    cos,
    sin,
    values,
    REFINED: tl.constexpr,
    PAIRS: tl.constexpr,
    UPPER_BYTES: tl.constexpr,
    K_BYTES: tl.constexpr,
    V_BYTES: tl.constexpr,
    CHUNK: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KIND: tl.constexpr,
    IN_ROWS: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
):
    head = tl.program_id(2) * HEADS + tl.program_id(1)
    d = tl.arange(0, DIM)[None, :]
    real = d < HEAD_DIM
    above = _rows_of(
        anchor, anchor_pitch, num_tokens, 0, True, HEADS, UPPER_BYTES, K_BYTES, V_BYTES, ROWS
    )
    below = _rows_of(
        residual, residual_pitch, num_tokens, 0, False, HEADS, UPPER_BYTES, K_BYTES, V_BYTES, ROWS
    )
    exact = tl.zeros((ROWS, DIM), tl.float32)
    for start in range(0, HEAD_DIM, CHUNK):
        i = start + tl.arange(0, CHUNK)[None, :]
        code = _get(above, upper_start, upper, i, num_tokens, 0, UPPER_BYTES, HEADS, HEAD_DIM, ROWS)
        lost = tl.load(lower + _vector(0, HEADS) * HEAD_DIM + i)
        if REFINED:
            rest = _get(below, lower_start, lower, i, num_tokens, 0, K_BYTES, HEADS, HEAD_DIM, ROWS)
            middle = (((code << lost) | rest) << 1) | 1
        else:
            middle = ((code << 1) | 1) << lost
        level = middle.to(tl.float32) - tl.load(span + head * HEAD_DIM + i)
        row = start + tl.arange(0, CHUNK)[:, None]
        matrix = tl.load(basis + (head * HEAD_DIM + row) * HEAD_DIM + d, mask=real, other=0.0)
        exact = tl.dot(level, matrix, exact, input_precision="tf32")
    swapped = tl.load(partner + d, mask=real, other=0)
    valid = _tokens(num_tokens, ROWS)[1]
    scales = _scales_of(anchor, anchor_pitch, num_tokens, 0, HEADS, UPPER_BYTES, ROWS)
    scale = tl.load(scales, mask=valid, other=0).to(tl.int32)
    factor = tl.load(unit + head) * tl.load(values + scale)
    k = exact * factor[:, None]
    k += tl.load(mean + _vector(0, HEADS) * HEAD_DIM + d, mask=real, other=0.0)
    other = tl.gather(k, tl.broadcast_to(swapped, (ROWS, DIM)), 1)
    k = _turned(k, other, cos, sin, pair, side, d, num_tokens, -1, HEAD_DIM, PAIRS, ROWS)
    here, mask = _elements(
        layers, slots, index, num_tokens, stride_block, stride_head, stride_token, d,
        0, HEAD_DIM, BLOCK_SIZE, KIND, IN_ROWS, ALIGNED, ROWS,
    )  # fmt: skip
    tl.store(here, from_single(k, KIND), mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def _decode_v(
    layers,
    slots,
    index,
    num_tokens,
    stride_block,
    stride_head,
    stride_token,
    mean,
    anchor,
    anchor_pitch,
    residual,
    residual_pitch,
    upper,
    upper_start,
    lower,
    lower_start,
    to_raw,
    levels,
    num_even,
    STAGES: tl.constexpr,
    REFINED: tl.constexpr,
    UPPER_BYTES: tl.constexpr,
    K_BYTES: tl.constexpr,
    V_BYTES: tl.constexpr,
    CHUNK: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KIND: tl.constexpr,
    IN_ROWS: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
):
    d = tl.arange(0, DIM)[None, :]
    real = d < HEAD_DIM
    place = _rows_of(
        anchor, anchor_pitch, num_tokens, 1, True, HEADS, UPPER_BYTES, K_BYTES, V_BYTES, ROWS
    )
    code = _get(place, upper_start, upper, d, num_tokens, 1, UPPER_BYTES, HEADS, HEAD_DIM, ROWS)
    if REFINED:
        place = _rows_of(
            residual, residual_pitch, num_tokens, 1, False, HEADS, UPPER_BYTES, K_BYTES, V_BYTES,
            ROWS,
        )  # fmt: skip
        rest = _get(place, lower_start, lower, d, num_tokens, 1, V_BYTES, HEADS, HEAD_DIM, ROWS)
        lost = tl.load(lower + _vector(1, HEADS) * HEAD_DIM + d, mask=real, other=0)
        code = (code << lost) | rest
    _, valid = _tokens(num_tokens, ROWS)
    scales = _scales_of(anchor, anchor_pitch, num_tokens, 1, HEADS, UPPER_BYTES, ROWS)
    factor = tl.load(to_raw + tl.load(scales, mask=valid, other=0).to(tl.int32))
    u = tl.load(levels + code + (d & 1) * num_even)
    v = walsh_hadamard(tl.where(real, u, 0.0) * factor[:, None], STAGES)
    v += tl.load(mean + _vector(1, HEADS) * HEAD_DIM + d, mask=real, other=0.0)
    here, mask = _elements(
        layers, slots, index, num_tokens, stride_block, stride_head, stride_token, d,
        1, HEAD_DIM, BLOCK_SIZE, KIND, IN_ROWS, ALIGNED, ROWS,
    )  # fmt: skip
    tl.store(here, from_single(v, KIND), mask=mask)
