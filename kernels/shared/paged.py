# SPDX-License-Identifier: Apache-2.0
"""Element addressing in vLLM's paged KV cache.

vLLM registers one strided view `[blocks, heads, N, C]` per layer (`v1/kv_cache_interface.py`,
`compute_layer_kv_cache_shape_bytes`), but how K and V of a token lie inside a (block, head) page
is the attention backend's business: FlashAttention stores `[K | V]` rows, the CPU backend packs
K for its matrix instructions. `PageIndex` holds that inner order as plain offsets, so that one
gather and one scatter serve every backend.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

_STORAGE_BITS: dict[torch.dtype, tuple[torch.dtype, type[np.unsignedinteger]]] = {
    torch.bfloat16: (torch.int16, np.uint16),
    torch.float16: (torch.int16, np.uint16),
    torch.float32: (torch.int32, np.uint32),
}


@dataclass(frozen=True)
class PageIndex:
    """Offsets, in elements, of K and V inside one (block, head) page.

    k_index, v_index: int64 [N, D], C-contiguous. Element (n, d) of the page that starts at
    storage element p lies at p + k_index[n, d] (V: p + v_index[n, d]).
    """

    k_index: NDArray[np.int64]
    v_index: NDArray[np.int64]

    def __post_init__(self) -> None:
        if self.k_index.ndim != 2 or self.k_index.shape != self.v_index.shape:
            raise ValueError(
                f"page index: K {self.k_index.shape} and V {self.v_index.shape} "
                "must both be [block_size, head_dim]"
            )
        for name in ("k_index", "v_index"):
            index = np.ascontiguousarray(getattr(self, name), dtype=np.int64)
            if index.size == 0 or index.min() < 0:
                raise ValueError(f"page index: {name} is empty or has negative offsets")
            object.__setattr__(self, name, index)
        if np.unique(np.concatenate([self.k_index, self.v_index])).size != 2 * self.k_index.size:
            raise ValueError("page index: two elements share one offset")

    @property
    def block_size(self) -> int:
        return self.k_index.shape[0]

    @property
    def head_dim(self) -> int:
        return self.k_index.shape[1]

    @property
    def extent(self) -> int:
        """Elements from the page's start to behind its last element."""
        return int(max(self.k_index.max(), self.v_index.max())) + 1

    @classmethod
    def rows(cls, block_size: int, head_dim: int, stride_n: int, stride_c: int = 1) -> PageIndex:
        """FlashAttention-like pages: token n is one row `[K (D) | V (D)]`; strides in elements."""
        row = np.arange(block_size, dtype=np.int64)[:, None] * stride_n
        column = np.arange(head_dim, dtype=np.int64)[None, :]
        return cls(row + column * stride_c, row + (head_dim + column) * stride_c)


class PagedKVCache:
    """All layers of one worker's paged KV cache, addressed by slot.

    slot = block * block_size + offset, as in vLLM's slot mapping. `block_size` is the N of the
    registered views; where vLLM splits a manager block into several kernel blocks, these follow
    each other, so that slots computed with the manager's block size mean the same element.

    caches: layer name -> view [blocks, heads, N, C]; all of one shape, stride, dtype and device.
    Raises ValueError, naming the layer, for anything else.
    """

    def __init__(
        self,
        caches: Mapping[str, torch.Tensor],
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        index: PageIndex,
    ) -> None:
        if not caches:
            raise ValueError("no KV cache registered")
        if (index.block_size, index.head_dim) != (block_size, head_dim):
            raise ValueError(
                f"page index is for [{index.block_size}, {index.head_dim}], the cache for "
                f"[{block_size}, {head_dim}] (block_size, head_dim)"
            )
        first_name, first = next(iter(caches.items()))
        if first.dtype not in _STORAGE_BITS:
            raise ValueError(f"KV cache dtype {first.dtype} is not bfloat16, float16 or float32")
        if first.ndim != 4 or first.shape[1] != num_kv_heads:
            raise ValueError(
                f"{first_name}: KV cache shape {tuple(first.shape)} is not "
                f"[blocks, {num_kv_heads} heads, N, C]"
            )
        for name, cache in caches.items():
            for what in ("shape", "dtype", "device"):
                if getattr(cache, what) != getattr(first, what):
                    raise ValueError(
                        f"{name} and {first_name} differ in {what}: "
                        f"{getattr(cache, what)} and {getattr(first, what)}"
                    )
            if cache.stride() != first.stride():
                raise ValueError(f"{name} and {first_name} differ in stride")
        self.layer_names = tuple(caches)
        self.block_size = block_size
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.index = index
        self.num_blocks = first.shape[0]
        self.dtype = first.dtype
        self.device = first.device
        self.stride_block, self.stride_head = first.stride()[:2]
        extent = 1 + sum(
            (size - 1) * stride for size, stride in zip(first.shape, first.stride(), strict=True)
        )
        last_page = (self.num_blocks - 1) * self.stride_block + (
            num_kv_heads - 1
        ) * self.stride_head
        if last_page + index.extent > extent:
            raise ValueError(
                f"page index reaches {index.extent} elements into a page, beyond the cache view "
                f"of shape {tuple(first.shape)} and strides {first.stride()}"
            )
        self._flat = [
            torch.as_strided(cache.detach(), (extent,), (1,), cache.storage_offset())
            for cache in caches.values()
        ]
        self.device_index = torch.from_numpy(np.stack([index.k_index, index.v_index])).to(
            self.device
        )
        """The page index on the cache's device: int64 [2, N, D], K first."""

    @property
    def num_layers(self) -> int:
        return len(self._flat)

    @property
    def num_slots(self) -> int:
        return self.num_blocks * self.block_size

    @functools.cached_property
    def layer_addresses(self) -> torch.Tensor:
        """Address of element 0 of every layer: int64 [L] on the cache's device."""
        return torch.tensor([flat.data_ptr() for flat in self._flat], device=self.device)

    @functools.cached_property
    def addresses_aligned(self) -> bool:
        """Whether all `layer_addresses` are multiples of 16 bytes."""
        return all(flat.data_ptr() % 16 == 0 for flat in self._flat)

    @functools.cached_property
    def row_stride(self) -> int:
        """Elements from token to token where pages are rows `[K | V]` without gaps inside a row
        (FlashAttention's); 0 for any other order."""
        k, v = self.index.k_index, self.index.v_index
        stride = int(k[1, 0] - k[0, 0]) if self.block_size > 1 else 2 * self.head_dim
        rows = np.arange(self.block_size)[:, None] * stride + np.arange(self.head_dim)
        in_rows = np.array_equal(k, rows) and np.array_equal(v, rows + self.head_dim)
        return stride if in_rows else 0

    def bits(self, layer: int) -> NDArray[np.unsignedinteger]:
        """The layer's storage as a flat writable numpy view: uint16 (16-bit dtypes) or uint32.

        Page (block, head) starts at element block * stride_block + head * stride_head.
        Raises ValueError unless the cache is in CPU memory.
        """
        if self.device.type != "cpu":
            raise ValueError(f"KV cache is on {self.device}, not in CPU memory")
        torch_bits, numpy_bits = _STORAGE_BITS[self.dtype]
        return self._flat[layer].view(torch_bits).numpy().view(numpy_bits)

    def check_slots(self, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        """`slots` as contiguous int64 [T]; ValueError if one lies outside the cache."""
        slots = np.asarray(slots)
        if slots.ndim != 1 or not np.issubdtype(slots.dtype, np.integer):
            raise ValueError(f"slots must be integers [T], not {slots.dtype} {slots.shape}")
        if slots.size and (slots.min() < 0 or slots.max() >= self.num_slots):
            raise ValueError(
                f"slots {slots.min()} to {slots.max()} leave the cache of {self.num_slots} slots"
            )
        return np.ascontiguousarray(slots, dtype=np.int64)

    def gather(self, layer: int, slots: NDArray[np.int64]) -> torch.Tensor:
        """K and V at `slots`: [T, 2, heads, D] in the cache's dtype, on its device."""
        return self._flat[layer][self._addresses(slots)]

    def scatter(self, layer: int, slots: NDArray[np.int64], values: torch.Tensor) -> None:
        """Write `values` [T, 2, heads, D] to `slots`; converts to the cache's dtype."""
        addresses = self._addresses(slots)
        if values.shape != addresses.shape:
            raise ValueError(f"values {tuple(values.shape)} for {tuple(addresses.shape)} elements")
        self._flat[layer][addresses] = values.to(self.device, self.dtype)

    def gather_vectors(
        self, slots: NDArray[np.int64], vectors: NDArray[np.int64]
    ) -> NDArray[np.uint8]:
        """Single head vectors as they are: uint8 [n, D * itemsize].

        slots, vectors: int64 [n]; vector = (layer * 2 + (0 for K, 1 for V)) * heads + head.
        """
        slots = self.check_slots(slots)
        out = np.empty((len(slots), self.head_dim * self.dtype.itemsize), dtype=np.uint8)
        for row, (slot, vector) in enumerate(zip(slots, vectors, strict=True)):
            layer, addresses = self._vector(int(slot), int(vector))
            out[row] = self._flat[layer][addresses].cpu().view(torch.uint8).numpy()
        return out

    def scatter_vectors(
        self, slots: NDArray[np.int64], vectors: NDArray[np.int64], data: NDArray[np.uint8]
    ) -> None:
        """Inverse of `gather_vectors`. ValueError for a vector or slot outside the cache."""
        slots = self.check_slots(slots)
        if data.shape != (len(slots), self.head_dim * self.dtype.itemsize):
            raise ValueError(f"{len(slots)} vectors cannot be read from {data.shape} bytes")
        for row, (slot, vector) in enumerate(zip(slots, vectors, strict=True)):
            layer, addresses = self._vector(int(slot), int(vector))
            values = torch.from_numpy(data[row].copy()).view(self.dtype)
            self._flat[layer][addresses] = values.to(self.device)

    def _vector(self, slot: int, vector: int) -> tuple[int, torch.Tensor]:
        """Layer of a vector, and the storage elements of its D values."""
        layer, rest = divmod(vector, 2 * self.num_kv_heads)
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"vector {vector} is outside the {self.num_layers} layers")
        kv, head = divmod(rest, self.num_kv_heads)
        block, offset = divmod(slot, self.block_size)
        page = block * self.stride_block + head * self.stride_head
        return layer, self.device_index[kv, offset] + page

    def _addresses(self, slots: NDArray[np.int64]) -> torch.Tensor:
        """Storage elements of every (token, K|V, head, d): int64 [T, 2, heads, D]."""
        slot = torch.from_numpy(self.check_slots(slots)).to(self.device)
        block, offset = slot // self.block_size, slot % self.block_size
        head = torch.arange(self.num_kv_heads, device=self.device) * self.stride_head
        page = (block * self.stride_block)[:, None] + head
        inside = self.device_index[:, offset].transpose(0, 1)  # [T, 2, D]
        return page[:, None, :, None] + inside[:, :, None, :]
