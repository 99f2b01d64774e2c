# SPDX-License-Identifier: Apache-2.0
"""The exact tier: what separates the refined reconstruction from the true bits, per token.

A token's bytes: xxh3-64 of its true values, then for each byte plane of the difference a length
(u32) and that plane deflated by zlib. The difference is taken between ordered codes (bits mapped to
integers that keep the order of the floats), folded so that small ones of either sign are small, so
its upper planes are nearly all zero. All of it is integer arithmetic.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np
import torch
import xxhash
from lynx_kernels.paged import PagedKVCache
from numpy.typing import NDArray

from lynx_connector.codec.base import Codec, CodecError, Rows

_LEVEL = 1
_LENGTH = struct.Struct("<I")


class ExactTier:
    """Refines `codec`'s final reconstruction to the true bits; any dtype of the cache."""

    def __init__(self, codec: Codec) -> None:
        """Raises CodecError for a codec of one tier."""
        if len(codec.tiers) < 2:
            raise CodecError(f"codec {codec.name} has no tier to refine")
        self.codec = codec
        self._word = np.dtype("<u2" if codec.dtype.itemsize == 2 else "<u4")

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
        true, coarse = self._words(cache, slots), self._words(refined, refined_slots)
        difference = (_ordered(true) - _ordered(coarse)).astype(self._word)
        sign = difference >> (8 * self._word.itemsize - 1)
        folded = (difference << 1) ^ (0 - sign).astype(self._word)
        tokens = []
        for values, token in zip(true, folded, strict=True):
            parts = [xxhash.xxh3_64_digest(values.tobytes())]
            for plane in np.ascontiguousarray(token.view(np.uint8).reshape(-1, token.itemsize).T):
                packer = zlib.compressobj(_LEVEL, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY)
                packed = packer.compress(plane.tobytes()) + packer.flush()
                parts += [_LENGTH.pack(len(packed)), packed]
            tokens.append(b"".join(parts))
        lengths = np.array([len(token) for token in tokens], dtype=np.uint32)
        return np.frombuffer(b"".join(tokens), np.uint8).copy(), lengths

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
        coarse = self._words(cache, slots)
        true = np.empty_like(coarse)
        raw, start = data.tobytes(), 0
        for index, length in enumerate(lengths.tolist()):
            token = raw[start : start + length]
            start += length
            folded = self._planes(token[8:], coarse.shape[1])
            difference = (folded >> 1) ^ (0 - (folded & 1)).astype(self._word)
            true[index] = _unordered((_ordered(coarse[index]) + difference).astype(self._word))
            if xxhash.xxh3_64_digest(true[index].tobytes()) != token[:8]:
                raise CodecError(f"exact tier: checksum of token {index} differs")
        g = self.codec.geometry
        values = torch.from_numpy(true.view(np.uint8)).view(self.codec.dtype)
        values = values.reshape(len(slots), g.num_layers, 2, g.num_kv_heads, g.head_dim)
        for layer in range(g.num_layers):
            cache.scatter(layer, slots, values[:, layer])

    def _words(self, cache: PagedKVCache, slots: NDArray[np.int64]) -> NDArray:
        """Bits of the tokens at `slots`: [T, elements]."""
        layers = [cache.gather(layer, slots) for layer in range(cache.num_layers)]
        values = torch.stack(layers, dim=1).flatten(1).cpu()
        return values.view(torch.uint8).numpy().view(self._word)

    def _planes(self, data: bytes, elements: int) -> NDArray:
        planes = np.empty((self._word.itemsize, elements), dtype=np.uint8)
        start = 0
        for plane in planes:
            if len(data) - start < _LENGTH.size:
                raise CodecError("exact tier: a token's bytes are too few")
            (length,) = _LENGTH.unpack_from(data, start)
            start += _LENGTH.size
            try:
                unpacker = zlib.decompressobj(-15)
                content = unpacker.decompress(data[start : start + length], elements + 1)
            except zlib.error as error:
                raise CodecError(f"exact tier: {error}") from None
            if len(content) != elements or not unpacker.eof:
                raise CodecError("exact tier: a plane has the wrong size")
            plane[:] = np.frombuffer(content, np.uint8)
            start += length
        if start != len(data):
            raise CodecError("exact tier: a token's bytes are too many")
        return np.ascontiguousarray(planes.T).view(self._word).reshape(-1)


def _ordered(bits: NDArray) -> NDArray:
    """Bits of floats as integers of the same order; -0 lies just below +0."""
    top = bits.dtype.type(1 << (8 * bits.itemsize - 1))
    return np.where(bits & top, ~bits, bits | top)


def _unordered(ordered: NDArray) -> NDArray:
    top = ordered.dtype.type(1 << (8 * ordered.itemsize - 1))
    return np.where(ordered & top, ordered ^ top, ~ordered)
