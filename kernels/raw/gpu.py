# SPDX-License-Identifier: Apache-2.0
"""Unchanged KV, Triton: copies page elements to rows and back, all layers a launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from lynx_kernels.shared.paged import PagedKVCache
from lynx_kernels.shared.tiles_gpu import (
    FLOAT32,
    OPTIONS,
    element_pointers,
    grid,
    page_arguments,
    row_pointers,
)


def encode(cache: PagedKVCache, slots: torch.Tensor, rows: torch.Tensor) -> None:
    """Copy K and V of every layer at `slots` into rows on the cache's device.

    slots: int64 [T], inside the cache; rows: uint8 [T, L*2*H*D * itemsize], C-contiguous and
    aligned to 16 bytes.
    """
    _launch(cache, slots, rows, gather=True)


def decode(cache: PagedKVCache, slots: torch.Tensor, rows: torch.Tensor) -> None:
    """Copy rows to K and V of every layer at `slots`, which must not repeat."""
    _launch(cache, slots, rows, gather=False)


def _launch(cache: PagedKVCache, slots: torch.Tensor, rows: torch.Tensor, gather: bool) -> None:
    _copy[grid(cache, len(slots))](
        **page_arguments(cache, slots),
        rows=rows,
        pitch=rows.stride(0) // cache.dtype.itemsize,
        GATHER=gather,
        **OPTIONS,
    )


@triton.jit(do_not_specialize=["num_tokens"])
def _copy(
    layers,
    slots,
    index,
    num_tokens,
    stride_block,
    stride_head,
    stride_token,
    rows,
    pitch,
    GATHER: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KIND: tl.constexpr,
    IN_ROWS: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
):
    elements, mask = element_pointers(
        layers, slots, index, num_tokens, stride_block, stride_head, stride_token,
        HEADS, HEAD_DIM, DIM, BLOCK_SIZE, KIND, IN_ROWS, ALIGNED, ROWS,
    )  # fmt: skip
    if KIND == FLOAT32:
        words = rows.to(tl.pointer_type(tl.uint32), bitcast=True)
    else:
        words = rows.to(tl.pointer_type(tl.uint16), bitcast=True)
    place = row_pointers(words, pitch, HEAD_DIM, DIM, HEADS, ROWS)
    if GATHER:
        tl.store(place, tl.load(elements, mask=mask), mask=mask)
    else:
        tl.store(elements, tl.load(place, mask=mask), mask=mask)
