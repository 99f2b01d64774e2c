# SPDX-License-Identifier: Apache-2.0
"""Unchanged KV, numba: copies page elements to rows and back, one layer a call."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from lynx_kernels.shared.paged import PagedKVCache
from lynx_kernels.shared.tiles_cpu import (
    PAGE_TYPES,
    RUN,
    compile_kernel,
    page_arguments,
    storage_type,
)
from numba import types
from numpy import uint64
from numpy.typing import NDArray


def encode_layer(
    cache: PagedKVCache, layer: int, slots: NDArray[np.int64], rows: NDArray[np.unsignedinteger]
) -> None:
    """Copy one layer's K and V at `slots` into its columns of the rows.

    slots: int64 [T], checked; rows: the dtype of `cache.bits`, [T, L*2*H*D], C-contiguous and
    aligned.
    """
    _copier(cache.dtype.itemsize, True)(*page_arguments(cache, layer, slots), layer, rows)


def decode_layer(
    cache: PagedKVCache, layer: int, slots: NDArray[np.int64], rows: NDArray[np.unsignedinteger]
) -> None:
    """Copy one layer's columns of the rows to K and V at `slots`."""
    _copier(cache.dtype.itemsize, False)(*page_arguments(cache, layer, slots), layer, rows)


@functools.cache
def _copier(itemsize: int, gather: bool) -> Callable[..., None]:
    storage = storage_type(itemsize)
    rows = types.Array(storage.dtype, 2, "C", readonly=not gather)
    return compile_kernel(_gather if gather else _scatter, storage, *PAGE_TYPES, types.int64, rows)


def _gather(
    flat,
    kind,
    block_size,
    stride_block,
    stride_head,
    num_heads,
    k_index,
    v_index,
    slots,
    layer,
    rows,
):
    head_dim = k_index.shape[1]
    for run in range(0, slots.size, RUN):
        for vector in range(2 * num_heads):
            index = k_index if vector < num_heads else v_index
            column = (layer * 2 * num_heads + vector) * head_dim
            for token in range(run, min(run + RUN, slots.size)):
                block = slots[token] // block_size
                n = slots[token] - block * block_size
                base = block * stride_block + (vector % num_heads) * stride_head
                for d in range(head_dim):
                    rows[token, uint64(column + d)] = flat[uint64(base + index[n, d])]


def _scatter(
    flat,
    kind,
    block_size,
    stride_block,
    stride_head,
    num_heads,
    k_index,
    v_index,
    slots,
    layer,
    rows,
):
    head_dim = k_index.shape[1]
    for run in range(0, slots.size, RUN):
        for vector in range(2 * num_heads):
            index = k_index if vector < num_heads else v_index
            column = (layer * 2 * num_heads + vector) * head_dim
            for token in range(run, min(run + RUN, slots.size)):
                block = slots[token] // block_size
                n = slots[token] - block * block_size
                base = block * stride_block + (vector % num_heads) * stride_head
                for d in range(head_dim):
                    flat[uint64(base + index[n, d])] = rows[token, uint64(column + d)]
