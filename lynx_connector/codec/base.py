# SPDX-License-Identifier: Apache-2.0
"""What a codec is: blocks of the paged cache to tiers of bytes, and back.

Every tier is token-major: row t of a uint8 array [T, bytes_per_token] holds everything of token t,
all layers, K and V, all heads. So any range of tokens is a slice of rows, a frame is a slice of
memory, and producer and consumer may use different block sizes and cache layouts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from lynx_kernels.shared.paged import PagedKVCache, PageIndex
from numpy.typing import NDArray

from lynx_connector.codec import device
from lynx_connector.codec.types import DTYPES, CodecError, KVGeometry, Rows, Tier


class Codec(ABC):
    """One way to encode KV vectors, for one geometry. Stateless: safe to share between threads.

    Each vector is encoded on its own (and, with RoPE undone, from its position), so encoding a
    range of tokens gives the same rows whether it is done at once or in parts.
    """

    name: ClassVar[str]
    tiers: ClassVar[tuple[Tier, ...]]

    def __init__(self, geometry: KVGeometry) -> None:
        """Raises CodecError, naming what is unsupported."""
        if geometry.dtype not in DTYPES:
            raise CodecError(
                f"codec {self.name}: dtype {geometry.dtype!r} is not one of {', '.join(DTYPES)}"
            )
        for field in ("num_layers", "num_kv_heads", "head_dim"):
            if getattr(geometry, field) < 1:
                raise CodecError(f"codec {self.name}: {field} {getattr(geometry, field)} < 1")
        self.geometry = geometry
        self.dtype = DTYPES[geometry.dtype]

    def bytes_per_token(self, tier: Tier) -> int:
        """Width of a row of `tier`. Raises CodecError if the codec has no such tier."""
        if tier not in self.tiers:
            raise CodecError(f"codec {self.name} has no {tier.name.lower()} tier")
        return self._row_bytes(tier)

    def bits_per_element(self, tiers: Sequence[Tier] | None = None) -> float:
        """Bits that `tiers` (default: all) spend on one element, scales included."""
        total = sum(self.bytes_per_token(tier) for tier in tiers or self.tiers)
        return 8 * total / self.geometry.elements_per_token

    def encode(
        self,
        cache: PagedKVCache,
        slots: NDArray[np.int64],
        out: Mapping[Tier, Rows],
        first_position: int = 0,
    ) -> None:
        """Encode the tokens at `slots` into `out`.

        slots: int64 [T], of the tokens at positions first_position and up; out: for every tier of
        the codec a writable C-contiguous uint8 array
        [T, bytes_per_token]. Raises CodecError or ValueError before anything is written.
        """
        slots = self._check(cache, slots)
        if set(out) != set(self.tiers):
            raise CodecError(f"codec {self.name}: out must have exactly the tiers {self.tiers}")
        for tier, rows in out.items():
            self._check_rows(tier, rows, len(slots))
            if not rows.flags.writeable:
                raise CodecError(f"codec {self.name}: rows of {tier.name} are read-only")
        if cache.device.type == "cpu":
            self._encode_cpu(cache, slots, out, first_position)
            return
        device.encode(self, cache, slots, out, first_position)

    def decode(
        self,
        tiers: Sequence[Rows],
        cache: PagedKVCache,
        slots: NDArray[np.int64],
        first_position: int = 0,
    ) -> None:
        """Write the reconstruction of K and V into the paged cache at `slots`.

        slots and first_position as in `encode`; tiers: rows of the first one or more of the
        codec's tiers, in order, each C-contiguous
        uint8 [T, bytes_per_token]; more tiers replace the coarser reconstruction. Slots must not
        repeat. Raises CodecError or ValueError before anything is written.
        """
        slots = self._check(cache, slots)
        if not 1 <= len(tiers) <= len(self.tiers):
            raise CodecError(
                f"codec {self.name}: got {len(tiers)} tiers, has {len(self.tiers)} to decode from"
            )
        for tier, rows in zip(self.tiers, tiers, strict=False):
            self._check_rows(tier, rows, len(slots))
        if cache.device.type == "cpu":
            self._decode_cpu(tiers, cache, slots, first_position)
            return
        device.decode(self, tiers, cache, slots, first_position)

    def encode_device(
        self,
        cache: PagedKVCache,
        slots: torch.Tensor,
        out: Mapping[Tier, torch.Tensor],
        first_position: int = 0,
    ) -> None:
        """As `encode`, unchecked, from and to memory of the cache's device: queued on the current
        stream.

        slots: int64 [T]; out: uint8 [T, bytes_per_token] a tier, contiguous, aligned to 16 bytes.
        Here: the torch reference. Codecs with Triton kernels override both methods.
        """
        tokens = slots.cpu().numpy()
        layers = [cache.gather(layer, tokens) for layer in range(cache.num_layers)]
        encoded = self.encode_values(torch.stack(layers, dim=1), first_position)
        for tier, rows in encoded.items():
            out[tier].copy_(rows)

    def decode_device(
        self,
        tiers: Sequence[torch.Tensor],
        cache: PagedKVCache,
        slots: torch.Tensor,
        first_position: int = 0,
    ) -> None:
        """As `decode`, unchecked, from and to memory of the cache's device; see `encode_device`."""
        values = self.decode_values(tiers, first_position)
        tokens = slots.cpu().numpy()
        for layer in range(cache.num_layers):
            cache.scatter(layer, tokens, values[:, layer])

    def exceptions(self, anchor: Rows) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Vectors that the code cannot hold (NaN, infinity, overflow), to be sent as they are.

        anchor: rows of the anchor tier. Returns (token, vector), int64 [n] each, where vector is
        (layer * 2 + (0 for K, 1 for V)) * heads + head. `decode` makes them NaN.
        """
        none = np.zeros(0, dtype=np.int64)
        return none, none

    def error_spread(self, anchor: Rows) -> NDArray[np.int16]:
        """Expected error of each vector's final reconstruction: int16 [T, L * 2 * H].

        In 1/8 octaves: 8 * log2 of the standard deviation, to which `error_tilt` adds what is
        known of each element. The exact tier chooses its code by it. Raises CodecError for a codec
        of one tier.
        """
        raise CodecError(f"codec {self.name} has no tier to refine")

    @property
    def error_tilt(self) -> NDArray[np.int16]:
        """int16 [L, 2, H, D], 1/8 octaves: see `error_spread`."""
        g = self.geometry
        return np.zeros((g.num_layers, 2, g.num_kv_heads, g.head_dim), dtype=np.int16)

    def warmup(self, cache: PagedKVCache | None = None) -> None:
        """Compile or load the kernels that this geometry needs (seconds when not cached).

        cache: the one that will be used; its device decides. Without it, those of the CPU.
        """
        if cache is not None and cache.device.type != "cpu":
            device.warmup(self, cache)
            return
        shape = KVGeometry(1, 1, self.geometry.head_dim, self.geometry.dtype)
        small = type(self)(shape)
        head_dim = shape.head_dim
        page = torch.zeros(1, 1, 1, 2 * head_dim, dtype=self.dtype)
        index = PageIndex.rows(1, head_dim, 2 * head_dim)
        cache = PagedKVCache({"warmup": page}, 1, 1, head_dim, index)
        slots = np.zeros(1, dtype=np.int64)
        out = {t: np.zeros((1, small.bytes_per_token(t)), dtype=np.uint8) for t in self.tiers}
        small.encode(cache, slots, out)
        small.decode(list(out.values()), cache, slots)

    @abstractmethod
    def encode_values(
        self, values: torch.Tensor, first_position: int = 0
    ) -> dict[Tier, torch.Tensor]:
        """Torch reference, any device: values [T, L, 2, H, D] -> rows uint8 [T, bytes] per tier."""

    @abstractmethod
    def decode_values(self, tiers: Sequence[torch.Tensor], first_position: int = 0) -> torch.Tensor:
        """Torch reference, any device: rows as in `decode` -> values [T, L, 2, H, D]."""

    @abstractmethod
    def _row_bytes(self, tier: Tier) -> int: ...

    @abstractmethod
    def _encode_cpu(
        self,
        cache: PagedKVCache,
        slots: NDArray[np.int64],
        out: Mapping[Tier, Rows],
        first_position: int,
    ) -> None: ...

    @abstractmethod
    def _decode_cpu(
        self,
        tiers: Sequence[Rows],
        cache: PagedKVCache,
        slots: NDArray[np.int64],
        first_position: int,
    ) -> None: ...

    def _vectors(self, codes: torch.Tensor) -> torch.Tensor:
        """Columns of rows [T, vectors * width] as [T, L, 2, H, width]."""
        g = self.geometry
        return codes.reshape(len(codes), g.num_layers, 2, g.num_kv_heads, -1)

    def _check(self, cache: PagedKVCache, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        g = self.geometry
        expected = (g.num_layers, g.num_kv_heads, g.head_dim, self.dtype)
        actual = (cache.num_layers, cache.num_kv_heads, cache.head_dim, cache.dtype)
        if actual != expected:
            raise CodecError(
                f"codec {self.name}: cache (layers, heads, head_dim, dtype) is {actual}, "
                f"expected {expected}"
            )
        return cache.check_slots(slots)

    def _check_rows(self, tier: Tier, rows: Rows, tokens: int) -> None:
        expected = (tokens, self.bytes_per_token(tier))
        if rows.dtype != np.uint8 or rows.shape != expected or not rows.flags.c_contiguous:
            raise CodecError(
                f"codec {self.name}: rows of {tier.name} are {rows.dtype} {rows.shape}, "
                f"must be C-contiguous uint8 {expected}"
            )
