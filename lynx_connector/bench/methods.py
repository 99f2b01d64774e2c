# SPDX-License-Identifier: Apache-2.0
"""What a decode instance would hold after each tier: one method for each way to send KV."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from lynx_kernels.shared.paged import PagedKVCache, PageIndex

from lynx_connector.bench.baselines import Baseline
from lynx_connector.codec import Codec, Tier
from lynx_connector.codec.exact import ExactTier
from lynx_connector.tiers.raw_vectors import record_bytes

BLOCK_SIZE = 16
_LENGTH_BITS = 32  # of a token's variable-length exact code, as on the wire


@dataclass(frozen=True)
class Delivered:
    """Reconstructions of the same tokens, and what they cost.

    anchor, final: [T, L, 2, H, D] in the cache's dtype; anchor_bits, total_bits: bits of all T
    tokens, total including the anchor; exact_mismatches: elements whose bits differ after the exact
    tier, None where there is no such tier.
    """

    anchor: torch.Tensor
    final: torch.Tensor
    anchor_bits: float
    total_bits: float
    exact_mismatches: int | None = None


class Method(ABC):
    """One way to send KV."""

    @abstractmethod
    def deliver(self, values: torch.Tensor, first_position: int) -> Delivered:
        """Send tokens [T, L, 2, H, D] at positions first_position and up."""


class CodecMethod(Method):
    """A codec of the product, through paged caches as between two workers."""

    def __init__(self, codec: Codec, exact: bool = False) -> None:
        """exact: with the third tier behind the codec's own."""
        self._codec = codec
        self._exact = exact

    def deliver(self, values: torch.Tensor, first_position: int) -> Delivered:
        codec = self._codec
        source, target = paged_cache(values), paged_cache(torch.zeros_like(values))
        slots = np.arange(len(values))
        rows = {
            tier: np.zeros((len(slots), codec.bytes_per_token(tier)), np.uint8)
            for tier in codec.tiers
        }
        codec.encode(source, slots, rows, first_position)
        tokens, vectors = codec.exceptions(rows[Tier.ANCHOR])
        raw = source.gather_vectors(slots[tokens], vectors)
        held: list[torch.Tensor] = []
        for count in range(1, len(codec.tiers) + 1):
            codec.decode(list(rows.values())[:count], target, slots, first_position)
            target.scatter_vectors(slots[tokens], vectors, raw)
            held.append(paged_values(target, len(slots)))
        anchor_bits = 8 * (rows[Tier.ANCHOR].size + len(tokens) * record_bytes(raw.shape[1]))
        total = anchor_bits + 8 * sum(rows[tier].size for tier in codec.tiers[1:])
        if not self._exact:
            return Delivered(held[0], held[-1], anchor_bits, total)
        exact_bits = self._send_exact(source, target, slots, rows[Tier.ANCHOR])
        final = paged_values(target, len(slots))
        bits = {2: torch.int16, 4: torch.int32}[values.element_size()]
        differ = final.view(bits) != values.contiguous().view(bits)
        return Delivered(held[0], final, anchor_bits, total + exact_bits, int(differ.sum()))

    def _send_exact(
        self, source: PagedKVCache, target: PagedKVCache, slots: np.ndarray, anchor: np.ndarray
    ) -> float:
        """Bits spent on making `target`, which holds the refined values, equal to `source`."""
        tier = ExactTier(self._codec)
        data, lengths = tier.encode(source, slots, target, slots, anchor)
        tier.decode(data, lengths, target, slots, anchor)
        return 8 * data.size + _LENGTH_BITS * len(lengths)


class BaselineMethod(Method):
    """A comparison codec on values alone."""

    def __init__(self, baseline: Baseline) -> None:
        self._baseline = baseline

    def deliver(self, values: torch.Tensor, first_position: int) -> Delivered:
        if not len(values):
            return Delivered(values, values, 0, 0)
        code = self._baseline.encode(values)
        held = [
            self._baseline.decode(code, tiers).to(values.dtype)
            for tiers in range(1, len(code.bits) + 1)
        ]
        return Delivered(held[0], held[-1], code.bits[0], code.bits[-1])


def paged_cache(values: torch.Tensor) -> PagedKVCache:
    """A paged cache on the CPU whose slot t holds token t of values [T, L, 2, H, D]."""
    tokens, layers, _, heads, head_dim = values.shape
    blocks = max(-(-tokens // BLOCK_SIZE), 1)
    pages = torch.zeros(layers, blocks * BLOCK_SIZE, heads, 2, head_dim, dtype=values.dtype)
    pages[:, :tokens] = values.permute(1, 0, 3, 2, 4)
    shape = (layers, blocks, BLOCK_SIZE, heads, 2 * head_dim)
    views = pages.view(shape).transpose(2, 3).contiguous()
    index = PageIndex.rows(BLOCK_SIZE, head_dim, 2 * head_dim)
    caches = {f"layer {layer}": view for layer, view in enumerate(views)}
    return PagedKVCache(caches, BLOCK_SIZE, heads, head_dim, index)


def paged_values(cache: PagedKVCache, tokens: int) -> torch.Tensor:
    """Inverse of `paged_cache`: a copy of the first `tokens` slots."""
    shape = (cache.num_blocks, cache.num_kv_heads, BLOCK_SIZE, 2, cache.head_dim)
    layers = []
    for layer in range(cache.num_layers):
        words = torch.from_numpy(cache.bits(layer)).view(cache.dtype)
        layers.append(words.view(shape).permute(0, 2, 3, 1, 4).flatten(0, 1)[:tokens])
    return torch.stack(layers, dim=1)
