# SPDX-License-Identifier: Apache-2.0
"""Paged caches of noise in FlashAttention's rows, and what two of them differ in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from lynx_kernels.shared.paged import PagedKVCache, PageIndex

BLOCK_SIZE = 16
FIRST = 3
"""Position of the first token: rotations begin there."""


@dataclass(frozen=True)
class Shape:
    """Of one worker's KV of one prompt."""

    layers: int
    heads: int
    head_dim: int
    tokens: int

    @property
    def elements(self) -> int:
        return self.tokens * self.layers * 2 * self.heads * self.head_dim


class Load:
    """One prompt in `cache`, its blocks in random order; `target` is what is decoded into.

    slots: int64 [T] on the host, `there` on the device. With `odd` values some vectors are zero,
    tiny, huge, infinite or NaN.
    """

    def __init__(self, shape: Shape, dtype: str, device: str, odd: bool) -> None:
        self.shape, self.device = shape, torch.device(device)
        self.dtype = getattr(torch, dtype)
        blocks = -(-shape.tokens // BLOCK_SIZE) + 1
        order = np.random.default_rng(0).permutation(blocks)
        position = np.arange(shape.tokens)
        self.slots = order[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
        self.there = torch.from_numpy(self.slots).to(self.device)
        self.cache, self.target = (self._cache(blocks, seed) for seed in (0, 1))
        if odd:
            self._make_odd()

    @property
    def num_bytes(self) -> int:
        """Bytes of the prompt's KV in the cache's dtype."""
        return self.shape.elements * self.dtype.itemsize

    def rows(self, width: int) -> torch.Tensor:
        """Room for a tier: uint8 [T, width]."""
        return torch.zeros((self.shape.tokens, width), dtype=torch.uint8, device=self.device)

    def _cache(self, blocks: int, seed: int) -> PagedKVCache:
        s, noise = self.shape, torch.Generator(self.device).manual_seed(seed)
        size = (blocks, s.heads, BLOCK_SIZE, 2 * s.head_dim)
        layers = {
            f"layer {i}": torch.randn(size, generator=noise, device=self.device).to(self.dtype)
            for i in range(s.layers)
        }
        index = PageIndex.rows(BLOCK_SIZE, s.head_dim, 2 * s.head_dim)
        return PagedKVCache(layers, BLOCK_SIZE, s.heads, s.head_dim, index)

    def _make_odd(self) -> None:
        values = self.cache.gather(0, self.slots)
        limits = torch.finfo(self.dtype)
        odd = (0.0, limits.tiny / 4, limits.max, torch.inf, -torch.inf, torch.nan)
        for token, value in enumerate(odd[: len(values)]):
            values[token, token % 2, 0, token::5] = value
            if value == 0 or 0 < value < 1:
                values[token, token % 2, 0] = value
        self.cache.scatter(0, self.slots, values)


def everything(cache: PagedKVCache, slots: np.ndarray | None = None) -> torch.Tensor:
    """[T, L, 2, H, D] of the slots, by default all, in host memory."""
    chosen = np.arange(cache.num_slots) if slots is None else slots
    return torch.stack([cache.gather(i, chosen) for i in range(cache.num_layers)], dim=1).cpu()


def differing_rows(got: torch.Tensor, want: torch.Tensor, tolerated: float = 0) -> str:
    """What two tiers [T, bytes] differ in first; "" where they are equal, or where no more than
    the share `tolerated` of all bytes differs."""
    wrong = got.cpu() != want.cpu()
    share = float(wrong.float().mean())
    if share <= tolerated:
        return ""
    token, byte = wrong.nonzero()[0].tolist()
    return (
        f"{share:.2%} of the bytes; first token {token}, byte {byte}: "
        f"{int(got[token, byte])} instead of {int(want[token, byte])}"
    )


def differing_values(got: torch.Tensor, want: torch.Tensor) -> str:
    """The same of cache contents [slots, L, 2, H, D], bit for bit, every NaN alike."""
    word = torch.int32 if want.dtype == torch.float32 else torch.int16
    wrong = (got.view(word) != want.view(word)) & ~(got.isnan() & want.isnan())
    if not wrong.any():
        return ""
    where = tuple(wrong.nonzero()[0].tolist())
    slot, layer, kv, head, element = where
    return (
        f"{float(wrong.float().mean()):.2%} of the values; first slot {slot}, layer {layer}, "
        f"{'KV'[kv]}, head {head}, element {element}: {float(got[where])!r} instead of "
        f"{float(want[where])!r}"
    )
