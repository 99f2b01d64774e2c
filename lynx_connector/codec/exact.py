# SPDX-License-Identifier: Apache-2.0
"""The exact tier: what separates the refined reconstruction from the true bits, per token.

A token's bytes: xxh3-64 of its true values, then the code of `lynx_kernels.exact`, whose tables are
chosen by the error that the codec expects of each element. All of it is integer arithmetic.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
import xxhash
from lynx_kernels.exact import cpu as exact_cpu
from lynx_kernels.raw import cpu as raw_cpu
from lynx_kernels.shared.paged import PagedKVCache
from lynx_kernels.shared.tiles_cpu import KIND
from numpy.typing import NDArray

from lynx_connector.codec.base import Codec
from lynx_connector.codec.types import CodecError, Rows

_CHECKSUM = np.dtype("<u8")


class Coder(Protocol):
    """The code where the cache is: in host memory or on a GPU. `Any` is its kind of words: bits of
    the tokens' values, uint16 or uint32 [T, elements]."""

    chunk: int
    """Tokens to be encoded at once, to bound the scratch memory."""

    def words(self, cache: PagedKVCache, slots: NDArray[np.int64]) -> Any:
        """Words of the tokens at `slots`, which are inside the cache."""

    def write(self, cache: PagedKVCache, slots: NDArray[np.int64], words: Any) -> None:
        """Inverse of `words`."""

    def encode(
        self, true: Any, coarse: Any, spread: NDArray[np.int16]
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint32]]:
        """Bytes of all tokens in a row, room for a checksum before each, and their lengths."""

    def decode(
        self,
        data: NDArray[np.uint8],
        lengths: NDArray[np.uint32],
        coarse: Any,
        spread: NDArray[np.int16],
    ) -> Any:
        """True words. Raises ValueError for bytes that nothing is encoded to."""

    def on_host(self, words: Any) -> NDArray:
        """Words in host memory."""


class ExactTier:
    """Refines `codec`'s final reconstruction to the true bits; any dtype of the cache."""

    def __init__(self, codec: Codec) -> None:
        """Raises CodecError for a codec of one tier."""
        if len(codec.tiers) < 2:
            raise CodecError(f"codec {codec.name} has no tier to refine")
        self.codec = codec

    def coder(self, device: torch.device) -> Coder:
        """The coder for caches on `device`."""
        tilt = self.codec.error_tilt.astype(np.int16)
        tilt = np.ascontiguousarray(tilt.reshape(-1, self.codec.geometry.head_dim))
        kind = KIND[self.codec.dtype]
        if device.type == "cpu":
            return _HostCoder(kind, tilt)
        from lynx_connector.codec.exact_device import DeviceCoder

        return DeviceCoder(kind, tilt, _CHECKSUM.itemsize, device)

    def warmup(self, cache: PagedKVCache) -> None:
        """Compile or load what the cache's device needs (seconds when not cached), on the bits of
        its first slot."""
        coder = self.coder(cache.device)
        words = coder.words(cache, np.zeros(1, np.int64))
        spread = np.zeros((1, self.codec.geometry.vectors_per_token), np.int16)
        coder.decode(*coder.encode(words, words, spread), words, spread)

    def encode(
        self,
        cache: PagedKVCache,
        slots: NDArray[np.int64],
        refined: PagedKVCache,
        refined_slots: NDArray[np.int64],
        anchor_rows: Rows,
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint32]]:
        """Bytes of all tokens in a row (uint8 [n]) and the length of each (uint32 [T]).

        cache holds the true values at slots, refined the reconstruction at refined_slots.
        """
        coder = self.coder(cache.device)
        slots, refined_slots = cache.check_slots(slots), refined.check_slots(refined_slots)
        parts, lengths = [np.zeros(0, np.uint8)], [np.zeros(0, np.uint32)]
        for start in range(0, len(slots), coder.chunk):
            part = slice(start, start + coder.chunk)
            true = coder.words(cache, slots[part])
            coarse = coder.words(refined, refined_slots[part])
            data, sizes = coder.encode(true, coarse, self.codec.error_spread(anchor_rows[part]))
            # xxh3 is computed on the host, so that true values are copied there even from a GPU.
            for place, values in zip(_starts(sizes), coder.on_host(true), strict=True):
                data[place : place + _CHECKSUM.itemsize] = _checksum(values)
            parts.append(data)
            lengths.append(sizes)
        return np.concatenate(parts), np.concatenate(lengths)

    def decode(
        self,
        data: NDArray[np.uint8],
        lengths: NDArray[np.uint32],
        cache: PagedKVCache,
        slots: NDArray[np.int64],
        anchor_rows: Rows,
    ) -> None:
        """Turn the refined reconstruction at `slots` into the true bits, in place.

        Raises CodecError if the bytes are malformed or a token's checksum differs; then nothing
        has been written.
        """
        if len(lengths) != len(slots) or int(lengths.sum(dtype=np.uint64)) != len(data):
            raise CodecError("exact tier: lengths do not add up to the bytes received")
        coder = self.coder(cache.device)
        slots = cache.check_slots(slots)
        coarse = coder.words(cache, slots)
        try:
            true = coder.decode(data, lengths, coarse, self.codec.error_spread(anchor_rows))
        except ValueError as error:
            raise CodecError(f"exact tier: {error}") from None
        starts, values_of = _starts(lengths), coder.on_host(true)
        for index, (place, values) in enumerate(zip(starts, values_of, strict=True)):
            if not np.array_equal(data[place : place + _CHECKSUM.itemsize], _checksum(values)):
                raise CodecError(f"exact tier: checksum of token {index} differs")
        coder.write(cache, slots, true)


class _HostCoder:
    """`Coder` of caches in host memory; words are numpy arrays."""

    chunk = 64

    def __init__(self, kind: int, tilt: NDArray[np.int16]) -> None:
        self._kind = kind
        self._tilt = tilt

    def words(self, cache: PagedKVCache, slots: NDArray[np.int64]) -> NDArray:
        words = np.empty((len(slots), self._tilt.size), cache.bits(0).dtype)
        for layer in range(cache.num_layers):
            raw_cpu.encode_layer(cache, layer, slots, words)
        return words

    def write(self, cache: PagedKVCache, slots: NDArray[np.int64], words: NDArray) -> None:
        for layer in range(cache.num_layers):
            raw_cpu.decode_layer(cache, layer, slots, words)

    def encode(
        self, true: NDArray, coarse: NDArray, spread: NDArray[np.int16]
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint32]]:
        return exact_cpu.encode(true, coarse, spread, self._tilt, self._kind, _CHECKSUM.itemsize)

    def decode(
        self,
        data: NDArray[np.uint8],
        lengths: NDArray[np.uint32],
        coarse: NDArray,
        spread: NDArray[np.int16],
    ) -> NDArray:
        return exact_cpu.decode(
            data, lengths, coarse, spread, self._tilt, self._kind, _CHECKSUM.itemsize
        )

    def on_host(self, words: NDArray) -> NDArray:
        return words


def _starts(lengths: NDArray[np.uint32]) -> NDArray[np.int64]:
    """Where each token's bytes begin."""
    ends = np.cumsum(lengths, dtype=np.int64)
    return ends - lengths


def _checksum(values: NDArray) -> NDArray[np.uint8]:
    return np.array([xxhash.xxh3_64_intdigest(values.data)], _CHECKSUM).view(np.uint8)
