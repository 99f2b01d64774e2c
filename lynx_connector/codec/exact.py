# SPDX-License-Identifier: Apache-2.0
"""The exact tier: what separates the refined reconstruction from the true bits, per token.

A token's bytes: xxh3-64 of its true values, then the code of `lynx_kernels.exact`, whose tables are
chosen by the error that the codec expects of each element. All of it is integer arithmetic.
"""

from __future__ import annotations

import numpy as np
import torch
import xxhash
from lynx_kernels import exact_cpu, raw_cpu
from lynx_kernels.paged import PagedKVCache
from lynx_kernels.tile_cpu import KIND
from numpy.typing import NDArray

from lynx_connector.codec.base import Codec, CodecError, Rows

_CHECKSUM = np.dtype("<u8")
_CHUNK = 64  # tokens encoded at once, to bound the scratch memory


class ExactTier:
    """Refines `codec`'s final reconstruction to the true bits; any dtype of the cache."""

    def __init__(self, codec: Codec) -> None:
        """Raises CodecError for a codec of one tier."""
        if len(codec.tiers) < 2:
            raise CodecError(f"codec {codec.name} has no tier to refine")
        self.codec = codec
        self._word = np.dtype(np.uint16 if codec.dtype.itemsize == 2 else np.uint32)
        self._kind = KIND[codec.dtype]
        tilt = codec.error_tilt.astype(np.int16)
        self._tilt = np.ascontiguousarray(tilt.reshape(-1, codec.geometry.head_dim))

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
        parts, lengths = [np.zeros(0, np.uint8)], [np.zeros(0, np.uint32)]
        for start in range(0, len(slots), _CHUNK):
            part = slice(start, start + _CHUNK)
            true = self._words(cache, slots[part])
            coarse = self._words(refined, refined_slots[part])
            spread = self.codec.error_spread(anchor_rows[part])
            data, sizes = exact_cpu.encode(
                true, coarse, spread, self._tilt, self._kind, _CHECKSUM.itemsize
            )
            for place, values in zip(_starts(sizes), true, strict=True):
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
        coarse = self._words(cache, slots)
        spread = self.codec.error_spread(anchor_rows)
        try:
            true = exact_cpu.decode(
                data, lengths, coarse, spread, self._tilt, self._kind, _CHECKSUM.itemsize
            )
        except ValueError as error:
            raise CodecError(f"exact tier: {error}") from None
        for index, (place, values) in enumerate(zip(_starts(lengths), true, strict=True)):
            if not np.array_equal(data[place : place + _CHECKSUM.itemsize], _checksum(values)):
                raise CodecError(f"exact tier: checksum of token {index} differs")
        if cache.device.type == "cpu":
            for layer in range(cache.num_layers):
                raw_cpu.decode_layer(cache, layer, slots, true)
            return
        g = self.codec.geometry
        rows = torch.from_numpy(true.view(np.uint8)).view(self.codec.dtype)
        rows = rows.reshape(len(slots), g.num_layers, 2, g.num_kv_heads, g.head_dim)
        for layer in range(g.num_layers):
            cache.scatter(layer, slots, rows[:, layer])

    def _words(self, cache: PagedKVCache, slots: NDArray[np.int64]) -> NDArray:
        """Bits of the tokens at `slots`: [T, elements]."""
        slots = cache.check_slots(slots)
        if cache.device.type == "cpu":
            words = np.empty((len(slots), self.codec.geometry.elements_per_token), self._word)
            for layer in range(cache.num_layers):
                raw_cpu.encode_layer(cache, layer, slots, words)
            return words
        layers = [cache.gather(layer, slots) for layer in range(cache.num_layers)]
        values = torch.stack(layers, dim=1).flatten(1).cpu()
        return values.view(torch.uint8).numpy().view(self._word)


def _starts(lengths: NDArray[np.uint32]) -> NDArray[np.int64]:
    """Where each token's bytes begin."""
    ends = np.cumsum(lengths, dtype=np.int64)
    return ends - lengths


def _checksum(values: NDArray) -> NDArray[np.uint8]:
    return np.array([xxhash.xxh3_64_intdigest(values.data)], _CHECKSUM).view(np.uint8)
