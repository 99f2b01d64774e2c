# SPDX-License-Identifier: Apache-2.0
"""Paged caches of random KV, laid out as on the device that is measured."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from lynx_kernels.shared.paged import PagedKVCache, PageIndex
from numpy.typing import NDArray

from lynx_connector.codec import KVGeometry
from lynx_connector.codec.types import DTYPES

NUM_LAYERS, NUM_KV_HEADS = 16, 8
"""Of every measured cache: large enough that one chunk does not fit a CPU's or GPU's cache."""
BLOCK_SIZE = {"cpu": 128, "cuda": 16}
"""vLLM's own defaults."""


@dataclass(frozen=True)
class Workload:
    """`slots` (int64 [T]) of `cache` hold one prompt: blocks in random order, tokens inside in
    order. `refined` is a cache of the same kind for what is decoded."""

    geometry: KVGeometry
    cache: PagedKVCache
    refined: PagedKVCache
    slots: NDArray[np.int64]

    @property
    def elements(self) -> int:
        """K and V elements of the prompt."""
        return len(self.slots) * self.geometry.elements_per_token

    @property
    def num_bytes(self) -> int:
        """Bytes of the prompt's KV in the cache's dtype."""
        return self.elements * self.cache.dtype.itemsize


def workload(head_dim: int, dtype: str, tokens: int, device: str) -> Workload:
    """Gaussian KV; on CPU in pages as vLLM's vectorised attention wants them (K as [D, N], then V
    as [N, D]), on CUDA in FlashAttention's rows."""
    geometry = KVGeometry(NUM_LAYERS, NUM_KV_HEADS, head_dim, dtype)
    block_size = BLOCK_SIZE[device]
    blocks = -(-tokens // block_size)
    order = np.random.default_rng(0).permutation(blocks)
    position = np.arange(tokens, dtype=np.int64)
    slots = order[position // block_size] * block_size + position % block_size
    cache, refined = (_cache(geometry, block_size, blocks, device, seed) for seed in (0, 1))
    return Workload(geometry, cache, refined, slots)


def _cache(
    geometry: KVGeometry, block_size: int, blocks: int, device: str, seed: int
) -> PagedKVCache:
    d = geometry.head_dim
    noise = torch.Generator(device).manual_seed(seed)
    shape = (blocks, geometry.num_kv_heads, block_size, 2 * d)
    layers = {
        f"layer {layer}": torch.randn(shape, generator=noise, device=device).to(
            DTYPES[geometry.dtype]
        )
        for layer in range(geometry.num_layers)
    }
    if device == "cpu":
        n, column = np.arange(block_size)[:, None], np.arange(d)[None, :]
        index = PageIndex(column * block_size + n, (block_size + n) * d + column)
    else:
        index = PageIndex.rows(block_size, d, 2 * d)
    return PagedKVCache(layers, block_size, geometry.num_kv_heads, d, index)
