# SPDX-License-Identifier: Apache-2.0
"""Paged blocks to staged tiers: rows, vectors that travel raw, and the exact tier."""

from __future__ import annotations

import numpy as np
import torch
from lynx_kernels.shared.paged import PagedKVCache, PageIndex

from lynx_connector.codec import Codec, CodecError, KVGeometry, Tier
from lynx_connector.codec.exact import ExactTier
from lynx_connector.codec.types import DTYPES
from lynx_connector.tiers.pieces import ExactRun, Piece, TokenRange
from lynx_connector.tiers.raw_vectors import RawVectors

EXACT_TOKENS = 256
"""Tokens whose exact tier is made at once; the scratch cache holds their reconstruction."""


class ChunkEncoder:
    """Encodes runs of tokens of one cache. For one thread."""

    def __init__(self, cache: PagedKVCache, geometry: KVGeometry):
        self._cache = cache
        self._geometry = geometry
        self._scratch: PagedKVCache | None = None

    def encode(self, piece: Piece, tokens: TokenRange, slots: np.ndarray) -> None:
        """Fill the rows of `tokens`, a part of `piece` that continues what was encoded before.

        slots: int64 [tokens]. Raises CodecError.
        """
        codec = piece.codec
        if not isinstance(codec, Codec):
            raise CodecError(f"codec {codec.name}: its tables are missing")
        out = {tier: piece.view(tier, tokens) for tier in codec.tiers}
        codec.encode(self._cache, slots, out, tokens.start)
        raw = self._raw_vectors(codec, out[Tier.ANCHOR], tokens, slots)
        if raw is not None:
            piece.raw.append(raw)
        if piece.exact_bytes:
            for start in range(0, len(tokens), EXACT_TOKENS):
                part = slice(start, min(start + EXACT_TOKENS, len(tokens)))
                piece.exact_runs.append(
                    self._exact(codec, out, raw, tokens.start + start, slots[part], part)
                )

    def _raw_vectors(
        self, codec: Codec, anchor: np.ndarray, tokens: TokenRange, slots: np.ndarray
    ) -> RawVectors | None:
        offsets, vectors = codec.exceptions(anchor)
        if not len(offsets):
            return None
        order = np.lexsort((vectors, offsets))
        offsets, vectors = offsets[order], vectors[order]
        data = self._cache.gather_vectors(slots[offsets], vectors)
        return RawVectors(offsets + tokens.start, vectors, data)

    def _exact(
        self,
        codec: Codec,
        out: dict[Tier, np.ndarray],
        raw: RawVectors | None,
        first: int,
        slots: np.ndarray,
        part: slice,
    ) -> ExactRun:
        """What brings the reconstruction of tokens `first` and up to their true bits."""
        scratch = self._scratch_cache()
        here = np.arange(len(slots), dtype=np.int64)
        codec.decode([out[tier][part] for tier in codec.tiers], scratch, here, first)
        if raw is not None and len(some := raw.of(first, first + len(slots))):
            scratch.scatter_vectors(some.tokens - first, some.vectors, some.data)
        data, lengths = ExactTier(codec).encode(
            self._cache, slots, scratch, here, out[Tier.ANCHOR][part]
        )
        return ExactRun(TokenRange(first, first + len(slots)), lengths, data)

    def _scratch_cache(self) -> PagedKVCache:
        if self._scratch is None:
            g = self._geometry
            shape = (1, g.num_kv_heads, EXACT_TOKENS, 2 * g.head_dim)
            index = PageIndex.rows(EXACT_TOKENS, g.head_dim, 2 * g.head_dim)
            layers = {
                str(layer): torch.zeros(shape, dtype=DTYPES[g.dtype], device=self._cache.device)
                for layer in range(g.num_layers)
            }
            self._scratch = PagedKVCache(layers, EXACT_TOKENS, g.num_kv_heads, g.head_dim, index)
        return self._scratch
