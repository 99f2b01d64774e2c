# SPDX-License-Identifier: Apache-2.0
"""Paged KV caches in the layouts that vLLM's attention backends use, without vLLM."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from lynx_kernels.shared.paged import PagedKVCache, PageIndex

LAYOUTS = ("cpu_vec", "flash", "flash_token_major", "layers_interleaved")


def cpu_vec_index(block_size: int, head_dim: int) -> PageIndex:
    """vLLM's "vec" CPU pages: K as [D, N], then V as [N, D]."""
    n, d = np.arange(block_size)[:, None], np.arange(head_dim)[None, :]
    return PageIndex(d * block_size + n, block_size * head_dim + n * head_dim + d)


def build_cache(
    layout: str = "flash",
    *,
    layers: int = 2,
    heads: int = 3,
    head_dim: int = 64,
    block_size: int = 16,
    blocks: int = 4,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> PagedKVCache:
    """A cache filled with Gaussian noise."""
    shape = (blocks, heads, block_size, 2 * head_dim)
    generator = torch.Generator().manual_seed(seed)

    def noise(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    if layout == "flash_token_major":  # vLLM's LBNHC: heads inside tokens
        stored = [noise(blocks, block_size, heads, 2 * head_dim) for _ in range(layers)]
        views = [cache.transpose(1, 2) for cache in stored]
    elif layout == "layers_interleaved":  # one tensor, all layers of a block side by side
        views = list(noise(blocks, layers, *shape[1:]).unbind(1))
    else:
        views = [noise(*shape) for _ in range(layers)]
    if layout == "cpu_vec":
        index = cpu_vec_index(block_size, head_dim)
    else:
        index = PageIndex.rows(block_size, head_dim, *views[0].stride()[2:])
    caches = {f"model.layers.{i}.self_attn": view for i, view in enumerate(views)}
    return PagedKVCache(caches, block_size, heads, head_dim, index)


@pytest.fixture(scope="session")
def make_cache() -> Callable[..., PagedKVCache]:
    return build_cache


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    return request.param
