# SPDX-License-Identifier: Apache-2.0
"""Tiles: how the numba kernels read and write the paged cache.

A tile holds one (layer, K or V, head) of LANES tokens as float32, element-major: element d of
token w is tile[d * LANES + w]. All arithmetic then runs along tokens, which the compiler turns
into plain SIMD whatever the page's inner order is.

Dtype conversions are done on integer bits, since numba has no 16-bit floats. Storing rounds to
nearest even, as torch does, and saturates instead of making an infinity; NaN stays NaN.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from lynx_kernels.shared.paged import PagedKVCache
from numba import types
from numpy import uint32, uint64
from numpy.typing import NDArray

LANES = 16
# Element-wise loops take eight elements of all lanes at once (head_dim is a multiple of 8): loops
# of a constant, larger length are worth the compiler's aliasing checks.
CHUNK = 8 * LANES
RUN = 128  # tokens that a kernel takes through all heads before it goes on: pages stay in cache

BFLOAT16, FLOAT16, FLOAT32 = 0, 1, 2
KIND = {torch.bfloat16: BFLOAT16, torch.float16: FLOAT16, torch.float32: FLOAT32}

READ_ROWS = types.Array(types.uint8, 2, "C", readonly=True)
WRITE_ROWS = types.Array(types.uint8, 2, "C")
INDEX = types.Array(types.int64, 2, "C", readonly=True)
SLOTS = types.Array(types.int64, 1, "C", readonly=True)

# The numpy error model divides without a test for zero, which would cost a branch.
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}

_MAGNITUDE = uint32(0x7FFFFFFF)
_SIGN = uint32(0x80000000)
_INFINITY = uint32(0x7F800000)


# numba types of `page_arguments` but the first, which `storage_type` gives.
PAGE_TYPES = (*(types.int64,) * 5, INDEX, INDEX, SLOTS)


def page_arguments(cache: PagedKVCache, layer: int, slots: NDArray[np.int64]) -> tuple[Any, ...]:
    """What every kernel takes first: one layer's storage, its addressing, and checked slots."""
    return (
        cache.bits(layer),
        KIND[cache.dtype],
        cache.block_size,
        cache.stride_block,
        cache.stride_head,
        cache.num_kv_heads,
        cache.index.k_index,
        cache.index.v_index,
        slots,
    )


def storage_type(itemsize: int) -> types.Array:
    """numba type of `PagedKVCache.bits` for a dtype of 2 or 4 bytes."""
    return types.Array(types.uint16 if itemsize == 2 else types.uint32, 1, "C")


def _sources_digest() -> str:
    """Of every file of this package; the same where they cannot be read."""
    digest = hashlib.blake2b(digest_size=6)
    for source in sorted(Path(__file__).parents[1].rglob("*.py")):
        with contextlib.suppress(OSError):
            digest.update(source.read_bytes())
    return digest.hexdigest()


# Read now: what is compiled later is still what was imported, whatever the files say by then.
_SOURCES = _sources_digest()


def compile_kernel(
    function: Callable[..., Any], *argument_types: Any, result: Any = types.void
) -> Callable[..., Any]:
    """`function` compiled for exactly these types, GIL released, kept in numba's disk cache.

    numba takes a cached kernel for current as long as the file that defines it is, whatever it has
    inlined from others. So its name in the cache carries a digest of all sources.

    Explicit types, so that read-only frames do not cost a second compilation. numba writes the
    cache beside the source or, where that is read-only, below the user's cache directory; where
    neither is possible the kernel is compiled anew in each process.
    """
    signature = result(*argument_types)
    function.__qualname__ = f"{function.__name__}_{_SOURCES}"
    try:
        return numba.njit([signature], cache=True, **_OPTIONS)(function)
    except (RuntimeError, OSError) as error:  # nowhere to keep it, or a full disk
        if isinstance(error, RuntimeError) and "no locator available" not in str(error):
            raise
        return numba.njit([signature], **_OPTIONS)(function)


@numba.njit(error_model="numpy")
def locate(slots, first, lanes, block_size, stride_block, head_offset, page, offset):
    """Fill page (start of the token's page) and offset (its place in the block) of a tile.

    The tile holds the tokens slots[first : first + lanes] of the head at `head_offset`.
    """
    for w in range(lanes):
        slot = slots[first + w]
        block = slot // block_size
        page[w] = block * stride_block + head_offset
        offset[w] = slot - block * block_size


@numba.njit
def load_tile(flat, kind, index, page, offset, lanes, bits):
    """Gather `lanes` tokens into the tile's bits (its uint32 view); zeros in unused lanes."""
    if lanes < LANES:
        bits[:] = uint32(0)
    shift = uint32(16) if kind == BFLOAT16 else uint32(0)
    for w in range(lanes):
        base = page[w]
        n = offset[w]
        for d in range(index.shape[1]):
            raw = uint32(flat[uint64(base + index[n, d])])
            bits[uint64(d * LANES + w)] = raw << shift
    if kind == FLOAT16:
        for i in range(bits.size):
            bits[i] = _half_to_single(bits[i])


@numba.njit
def store_tile(flat, kind, index, page, offset, lanes, bits):
    """Scatter `lanes` tokens, converted to the cache's dtype; overwrites the tile's bits."""
    if kind == BFLOAT16:
        for i in range(bits.size):
            bits[i] = _single_to_bfloat(bits[i])
    elif kind == FLOAT16:
        for i in range(bits.size):
            bits[i] = _single_to_half(bits[i])
    else:
        for i in range(bits.size):
            sign = bits[i] & _SIGN
            bits[i] = sign | _saturate(bits[i] & _MAGNITUDE, uint32(0x7F7FFFFF))
    for w in range(lanes):
        base = page[w]
        n = offset[w]
        for d in range(index.shape[1]):
            flat[uint64(base + index[n, d])] = bits[uint64(d * LANES + w)]


@numba.njit
def largest_magnitudes(bits, maximum):
    """Bits of every lane's largest magnitude into maximum[:LANES]; maximum: uint32 [CHUNK].

    Compared as integers, magnitudes keep their order, and NaN > infinity > every number.
    """
    maximum[:] = uint32(0)
    for start in range(0, bits.size, CHUNK):
        for i in range(CHUNK):
            magnitude = uint32(bits[uint64(start + i)] & _MAGNITUDE)
            maximum[uint64(i)] = max(maximum[uint64(i)], magnitude)
    for row in range(1, CHUNK // LANES):
        for w in range(LANES):
            maximum[w] = max(maximum[w], maximum[uint64(row * LANES + w)])


@numba.njit
def as_float(bits):
    return np.uint32(bits).view(np.float32)


@numba.njit
def as_bits(single):
    return np.float32(single).view(np.uint32)


@numba.njit
def _saturate(magnitude, limit):
    """Bits of a float32 magnitude, lowered to `limit` unless NaN."""
    over = magnitude > limit and magnitude <= _INFINITY
    return uint32(limit) if over else uint32(magnitude)


@numba.njit
def _single_to_bfloat(single):
    sign = uint32(single & _SIGN)
    magnitude = _saturate(single & _MAGNITUDE, uint32(0x7F7F0000))
    even = (magnitude >> uint32(16)) & uint32(1)
    rounded = uint32(magnitude + uint32(0x7FFF) + even)
    rounded = uint32(0x7FC00000) if magnitude > _INFINITY else rounded
    return uint32((sign | rounded) >> uint32(16))


@numba.njit
def _half_to_single(half):
    """Exact, subnormals included: one multiplication by a power of two re-biases the exponent."""
    sign = uint32((half & uint32(0x8000)) << uint32(16))
    magnitude = uint32((half & uint32(0x7FFF)) << uint32(13))
    scaled = as_bits(as_float(magnitude) * np.float32(2.0**112))
    special = magnitude >= uint32(0x0F800000)  # exponent all ones: infinity or NaN
    return uint32(sign | (uint32(magnitude | _INFINITY) if special else scaled))


@numba.njit
def _single_to_half(single):
    sign = uint32((single >> uint32(16)) & uint32(0x8000))
    magnitude = _saturate(single & _MAGNITUDE, uint32(0x477FE000))  # 65504
    even = (magnitude >> uint32(13)) & uint32(1)
    normal = uint32(magnitude + uint32(0x0FFF) + even - uint32(112 << 23)) >> uint32(13)
    # Below 2^-14 adding 0.5 puts the half's last bit at the float32's last bit and rounds there.
    shifted = as_bits(as_float(magnitude) + np.float32(0.5))
    rounded = shifted - uint32(126 << 23) if magnitude < uint32(113 << 23) else normal
    return uint32(sign | (uint32(0x7E00) if magnitude > _INFINITY else uint32(rounded)))
