# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel as operations on one load, each with what its reference makes of the same."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from lynx_kernels.exact import gpu as exact_gpu
from lynx_kernels.exact import reference as exact
from lynx_kernels.hadamard import gpu as hadamard_gpu
from lynx_kernels.hadamard import reference as hadamard
from lynx_kernels.klt import gpu as klt_gpu
from lynx_kernels.klt import reference as klt
from lynx_kernels.raw import gpu as raw_gpu
from lynx_kernels.raw import reference as raw
from lynx_kernels.shared.rotation import Rotation
from lynx_kernels.uniform import gpu as uniform_gpu
from lynx_kernels.uniform import reference as uniform

from scripts.gpu_check.loads import FIRST, Load, differing_rows, differing_values, everything

HEADER = 8
KIND = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
ROUNDED_OTHERWISE = 0.01
"""Share of klt's bytes that may differ: a sum of its encoder that was rounded otherwise."""


@dataclass(frozen=True)
class Op:
    """`run` does it once, on the load's device; `differs` names the first difference between what
    the last run made and the reference, "" where there is none."""

    name: str
    run: Callable[[], object]
    differs: Callable[[], str]


class Tiers(ABC):
    """A codec with one tier or two: `rows`, uint8 [T, bytes] each."""

    tolerated = 0.0

    def __init__(self, load: Load) -> None:
        self.load = load
        self.rows = [load.rows(width) for width in self.widths()]

    @abstractmethod
    def widths(self) -> list[int]:
        """Bytes of a token in each tier."""

    @abstractmethod
    def encode(self) -> None:
        """Values to `rows`."""

    @abstractmethod
    def decode(self, rows: list[torch.Tensor]) -> None:
        """The first tiers to values."""

    @abstractmethod
    def expected_rows(self, values: torch.Tensor) -> list[torch.Tensor]:
        """Of values [T, L, 2, H, D], by the reference."""

    @abstractmethod
    def expected_values(self, rows: list[torch.Tensor]) -> torch.Tensor:
        """Values of rows, by the reference."""

    def ops(self) -> list[Op]:
        """To be run in this order: decoding begins with what encoding has made."""
        names = ["decode", "patch"][: len(self.rows)]
        return [
            Op("encode", self.encode, self._encoded),
            *(
                Op(name, partial(self.decode, self.rows[: i + 1]), partial(self._decoded, i + 1))
                for i, name in enumerate(names)
            ),
        ]

    def _encoded(self) -> str:
        want = self.expected_rows(everything(self.load.cache, self.load.slots))
        found = ""
        for tier, (got, expected) in enumerate(zip(self.rows, want, strict=True)):
            different = differing_rows(got, expected, self.tolerated)
            if different and not found:
                found = f"tier {tier}: {different}"
        if found:  # decoding shall not fail for this
            for got, expected in zip(self.rows, want, strict=True):
                got.copy_(expected)
        return found

    def _decoded(self, count: int) -> str:
        """Compares the whole target: what lies beside the prompt may not change."""
        fresh = Load(self.load.shape, str(self.load.dtype)[6:], str(self.load.device), False)
        want = everything(fresh.target)
        want[self.load.slots] = self.expected_values([row.cpu() for row in self.rows[:count]])
        return differing_values(everything(self.load.target), want)

    def _vectors(self, rows: torch.Tensor) -> torch.Tensor:
        s = self.load.shape
        return rows.reshape(len(rows), s.layers, 2, s.heads, -1)


class Raw(Tiers):
    def widths(self) -> list[int]:
        return [self.load.num_bytes // self.load.shape.tokens]

    def encode(self) -> None:
        raw_gpu.encode(self.load.cache, self.load.there, self.rows[0])

    def decode(self, rows: list[torch.Tensor]) -> None:
        raw_gpu.decode(self.load.target, self.load.there, rows[0])

    def expected_rows(self, values: torch.Tensor) -> list[torch.Tensor]:
        return [raw.encode(values).flatten(1)]

    def expected_values(self, rows: list[torch.Tensor]) -> torch.Tensor:
        return raw.decode(self._vectors(rows[0]), self.load.dtype)


class Uniform(Tiers):
    def __init__(self, load: Load, bits: int) -> None:
        self.bits = bits
        super().__init__(load)

    def widths(self) -> list[int]:
        s = self.load.shape
        return [s.layers * 2 * s.heads * (s.head_dim * self.bits // 8 + 2)]

    def encode(self) -> None:
        uniform_gpu.encode(self.load.cache, self.load.there, self.rows[0], self.bits)

    def decode(self, rows: list[torch.Tensor]) -> None:
        uniform_gpu.decode(self.load.target, self.load.there, rows[0], self.bits)

    def expected_rows(self, values: torch.Tensor) -> list[torch.Tensor]:
        return [torch.cat([part.flatten(1) for part in uniform.encode(values, self.bits)], dim=1)]

    def expected_values(self, rows: list[torch.Tensor]) -> torch.Tensor:
        codes = self.load.shape.elements // self.load.shape.tokens * self.bits // 8
        parts = self._vectors(rows[0][:, :codes]), self._vectors(rows[0][:, codes:])
        return uniform.decode(parts[0].contiguous(), parts[1], self.bits, self.load.dtype)


class Hadamard(Tiers):
    def widths(self) -> list[int]:
        s = self.load.shape
        vectors = s.layers * 2 * s.heads
        return [vectors * (s.head_dim // 2 + 1), vectors * s.head_dim // 2]

    def encode(self) -> None:
        hadamard_gpu.encode(self.load.cache, self.load.there, *self.rows)

    def decode(self, rows: list[torch.Tensor]) -> None:
        residual = rows[1] if len(rows) == 2 else None
        hadamard_gpu.decode(self.load.target, self.load.there, rows[0], residual)

    def expected_rows(self, values: torch.Tensor) -> list[torch.Tensor]:
        anchor, scale, residual = (part.flatten(1) for part in hadamard.encode(values))
        return [torch.cat((anchor, scale), dim=1), residual]

    def expected_values(self, rows: list[torch.Tensor]) -> torch.Tensor:
        codes = self.load.shape.elements // self.load.shape.tokens // 2
        scale = self._vectors(rows[0][:, codes:]).squeeze(-1)
        residual = self._vectors(rows[1]) if len(rows) == 2 else None
        return hadamard.decode(self._vectors(rows[0][:, :codes]), scale, residual, self.load.dtype)


class Klt(Tiers):
    tolerated = ROUNDED_OTHERWISE

    def __init__(self, load: Load) -> None:
        self.code = klt_code(load.shape.layers, load.shape.heads, load.shape.head_dim)
        self.tables = klt_gpu.KltDevice.of(self.code, load.device)
        super().__init__(load)

    def widths(self) -> list[int]:
        s = self.load.shape
        upper, k, v = klt.vector_bytes(s.head_dim, self.code.anchor_bits)
        return [s.layers * 2 * s.heads * (upper + 1), s.layers * s.heads * (k + v)]

    def encode(self) -> None:
        klt_gpu.encode(
            self.load.cache, self.load.there, self.tables, self.rows[0], self.rows[1], FIRST
        )

    def decode(self, rows: list[torch.Tensor]) -> None:
        residual = rows[1] if len(rows) == 2 else None
        klt_gpu.decode(self.load.target, self.load.there, self.tables, rows[0], residual, FIRST)

    def expected_rows(self, values: torch.Tensor) -> list[torch.Tensor]:
        return list(klt.encode(self.code, values, FIRST))

    def expected_values(self, rows: list[torch.Tensor]) -> torch.Tensor:
        residual = rows[1] if len(rows) == 2 else None
        return klt.decode(self.code, rows[0], residual, FIRST, self.load.dtype)


def klt_code(layers: int, heads: int, head_dim: int) -> klt.KltCode:
    """Tables such as a model's, from noise: orthogonal bases in integers, widths of 4 to 11 bits
    whose sums stay below 2^24, a rotation of half of the elements."""
    rng = np.random.default_rng(head_dim)
    shape = layers, heads, head_dim
    total = np.broadcast_to(np.resize([11, 4, 8, 7], head_dim), shape)
    upper = np.broadcast_to(np.resize([6, 2, 4, 4], head_dim), shape)
    orthogonal = np.linalg.qr(rng.normal(size=(*shape, head_dim)))[0]
    basis = np.round(orthogonal * (60 / np.abs(orthogonal).max()))
    unit = np.full((layers, heads), 1 / 500, np.float32)
    assert (np.abs(basis) * np.exp2(total)[..., None]).sum(-2).max() < 1 << 24
    steps = rng.integers(0, 2**32, head_dim // 4)
    v_total = np.broadcast_to(klt.v_widths(head_dim), shape)
    analysis = np.linalg.inv(basis).swapaxes(-1, -2) / unit[..., None, None]
    return klt.KltCode(
        Rotation(tuple(steps.tolist()), is_neox=head_dim % 32 == 0),
        np.ascontiguousarray(analysis, np.float32),
        basis.astype(np.float32),
        unit,
        rng.normal(size=shape).astype(np.float32),
        rng.normal(size=shape).astype(np.float32),
        np.stack((upper, np.full_like(upper, 4)), axis=1).astype(np.int64),
        np.stack((total, v_total), axis=1).astype(np.int64),
        4,
    )


class Exact:
    """The exact tier's coder, on the bits of a cache and of what noise has made of them."""

    def __init__(self, load: Load) -> None:
        self.load, s = load, load.shape
        self.kind = KIND[load.dtype]
        vectors = s.layers * 2 * s.heads
        word = torch.uint32 if load.dtype == torch.float32 else torch.uint16
        size = (s.tokens, vectors * s.head_dim)
        noise = torch.Generator(load.device).manual_seed(0)
        values = torch.randn(size, generator=noise, device=load.device)
        near = values + torch.randn(size, generator=noise, device=load.device) / 300
        self.true, self.coarse = (x.to(load.dtype).view(word) for x in (values, near))
        # Errors that fit, beside some that were expected far smaller.
        spread = torch.full((s.tokens, vectors), -66, dtype=torch.int16, device=load.device)
        spread[::7] -= 100
        self.spread = spread
        self.tilt = torch.zeros((vectors, s.head_dim), dtype=torch.int16, device=load.device)
        self.data, self.lengths = torch.zeros(0, dtype=torch.uint8), torch.zeros(0)
        self.sizes, self.got = np.zeros(0, np.uint32), self.true

    def ops(self) -> list[Op]:
        return [Op("encode", self._encode, self._encoded), Op("decode", self._decode, self._same)]

    def _encode(self) -> None:
        arrays = self.true, self.coarse, self.spread, self.tilt
        self.data, self.lengths = exact_gpu.encode(*arrays, self.kind, HEADER)
        self.sizes = self.lengths.cpu().numpy().astype(np.uint32)

    def _encoded(self) -> str:
        tokens = exact.encode(
            self.true.cpu().numpy(), self.coarse.cpu().numpy(), self._sigma(), self.kind
        )
        want = [np.concatenate((np.zeros(HEADER, np.uint8), token)) for token in tokens]
        got = np.split(self.data.cpu().numpy(), np.cumsum(self.sizes)[:-1].astype(np.int64))
        found = ""
        for number, (one, other) in enumerate(zip(got, want, strict=True)):
            if len(one) != len(other):
                found = f"token {number}: {len(one)} bytes instead of {len(other)}"
            elif (one != other).any():
                byte = int((one != other).argmax())
                found = f"token {number}, byte {byte}: {one[byte]} instead of {other[byte]}"
            if found:  # decoding shall not fail for this
                self.data = torch.from_numpy(np.concatenate(want)).to(self.load.device)
                self.sizes = np.array([len(token) for token in want], np.uint32)
                break
        return found

    def _decode(self) -> None:
        arrays = self.coarse, self.spread, self.tilt
        self.got = exact_gpu.decode(self.data, self.sizes, *arrays, self.kind, HEADER)

    def _same(self) -> str:
        got, want = (x.cpu().numpy() for x in (self.got, self.true))
        wrong = np.argwhere(got != want)
        if not len(wrong):
            return ""
        token, element = wrong[0]
        bits = int(got[token, element]), int(want[token, element])
        return f"first token {token}, element {element}: {bits[0]:#x} instead of {bits[1]:#x}"

    def _sigma(self) -> np.ndarray:
        spread, tilt = self.spread.cpu().numpy(), self.tilt.cpu().numpy()
        return (spread[:, :, None] + tilt).reshape(len(spread), -1).astype(np.int16)


KERNELS: dict[str, Callable[[Load], Tiers | Exact]] = {
    "raw": Raw,
    "int8": partial(Uniform, bits=8),
    "int4": partial(Uniform, bits=4),
    "hadamard": Hadamard,
    "exact": Exact,
    "klt": Klt,
}
