# SPDX-License-Identifier: Apache-2.0
"""Element addressing: gather and scatter against plain indexing, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lynx_kernels.shared.paged import PagedKVCache, PageIndex


def flash_values(cache: torch.Tensor, slots: np.ndarray) -> torch.Tensor:
    """[T, 2, H, D] by plain indexing of a [B, H, N, 2D] view."""
    block_size = cache.shape[2]
    rows = torch.stack([cache[s // block_size, :, s % block_size] for s in slots.tolist()])
    return torch.stack(rows.chunk(2, dim=-1), dim=1)


@pytest.mark.parametrize("token_major", [False, True])
def test_gather_reads_the_registered_view(token_major: bool) -> None:
    view = torch.randn(5, 3, 16, 128)
    if token_major:
        view = torch.randn(5, 16, 3, 128).transpose(1, 2)
    index = PageIndex.rows(16, 64, *view.stride()[2:])
    cache = PagedKVCache({"layer": view}, 16, 3, 64, index)
    slots = np.array([79, 0, 17, 16, 33])
    assert torch.equal(cache.gather(0, slots), flash_values(view, slots))


def test_scatter_then_gather_returns_the_values_and_touches_nothing_else(
    make_cache, layout: str
) -> None:
    cache = make_cache(layout)
    everything = np.arange(cache.num_slots)
    slots = np.array([3, 60, 16, 47])
    before = [cache.gather(layer, everything).clone() for layer in range(cache.num_layers)]
    values = torch.randn(4, 2, 3, 64).to(cache.dtype)
    cache.scatter(1, slots, values)
    assert torch.equal(cache.gather(1, slots), values)
    others = np.setdiff1d(everything, slots)
    assert torch.equal(cache.gather(1, others), before[1][others])
    assert torch.equal(cache.gather(0, everything), before[0])


def test_bits_alias_the_cache(make_cache) -> None:
    cache = make_cache("flash", dtype=torch.float32, layers=1)
    cache.bits(0)[:] = np.float32(2.5).view(np.uint32)
    assert (cache.gather(0, np.arange(cache.num_slots)) == 2.5).all()


@pytest.mark.parametrize("slots", [[-1], [64], [0, 1000], [[0]], [0.5]])
def test_slots_outside_the_cache_are_refused(make_cache, slots: list) -> None:
    with pytest.raises(ValueError, match="slots"):
        make_cache("flash").gather(0, np.array(slots))


def test_an_index_that_leaves_the_page_is_refused() -> None:
    with pytest.raises(ValueError, match="beyond the cache view"):
        PagedKVCache({"l": torch.zeros(2, 1, 4, 16)}, 4, 1, 8, PageIndex.rows(4, 8, 32))


def test_an_index_with_overlapping_elements_is_refused() -> None:
    with pytest.raises(ValueError, match="share one offset"):
        PageIndex.rows(4, 8, 8)


def test_layers_of_different_shape_are_refused_by_name() -> None:
    caches = {"first": torch.zeros(2, 1, 4, 16), "second": torch.zeros(3, 1, 4, 16)}
    with pytest.raises(ValueError, match=r"second and first differ in shape"):
        PagedKVCache(caches, 4, 1, 8, PageIndex.rows(4, 8, 16))


def test_quantised_dtypes_are_refused() -> None:
    cache = torch.zeros(2, 1, 4, 16, dtype=torch.uint8)
    with pytest.raises(ValueError, match="uint8"):
        PagedKVCache({"l": cache}, 4, 1, 8, PageIndex.rows(4, 8, 16))
