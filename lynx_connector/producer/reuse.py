# SPDX-License-Identifier: Apache-2.0
"""Tiers of blocks that prefills have in vLLM's prefix cache, kept from the prefill before.

A block's hash names its tokens and all before them, but not its bits: vLLM computes an evicted
block anew, in other batches and so with other roundings, and does not tell the connector when
weights change. So what is kept carries a witness of the bits that it was made from.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import xxhash
from lynx_kernels.shared.paged import PagedKVCache

from lynx_connector.codec import Codec, Tier
from lynx_connector.engine.metadata import EncodeChunk, EncodePlan
from lynx_connector.producer.encoder import ChunkEncoder
from lynx_connector.tiers.pieces import ExactRun, Piece, TokenRange
from lynx_connector.tiers.raw_vectors import RawVectors


class BlockKey(NamedTuple):
    """vLLM's hash of a block, and how it is encoded."""

    block_hash: bytes
    plan: EncodePlan


@dataclass(frozen=True)
class EncodedBlock:
    """The tiers of one block's lossy tokens; owns its memory.

    witness: xxh3-128 of the last token's K and V in all layers; rows as in `Piece`.
    """

    witness: bytes
    rows: dict[Tier, np.ndarray]
    raw: RawVectors | None
    exact: ExactRun | None

    @property
    def num_bytes(self) -> int:
        """Host memory."""
        arrays = list(self.rows.values())
        if self.raw is not None:
            arrays += [self.raw.tokens, self.raw.vectors, self.raw.data]
        exact = self.exact.num_bytes if self.exact is not None else 0
        return sum(array.nbytes for array in arrays) + exact


class EncodedBlocks:
    """Encoded blocks within `limit_bytes`, the least recently used out. For one thread."""

    def __init__(self, limit_bytes: int):
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self._blocks: OrderedDict[BlockKey, EncodedBlock] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def find(self, key: BlockKey, witness: bytes) -> EncodedBlock | None:
        """The block, if it was made from these bits; one made from others is thrown away."""
        block = self._blocks.get(key)
        if block is not None and block.witness != witness:
            self._forget(key)
            return None
        return block

    def keep(self, key: BlockKey, block: EncodedBlock) -> None:
        """Keep a block as the one used last; not one that alone is over the limit."""
        if key in self._blocks:
            self._forget(key)
        if block.num_bytes > self.limit_bytes:
            return
        self._blocks[key] = block
        self.used_bytes += block.num_bytes
        while self.used_bytes > self.limit_bytes:
            self._forget(next(iter(self._blocks)))

    def _forget(self, key: BlockKey) -> None:
        self.used_bytes -= self._blocks.pop(key).num_bytes


@dataclass(frozen=True)
class ChunkBlock:
    """A full block that ends in a chunk: its tokens in `piece`, and what was kept of it."""

    key: BlockKey
    piece: Piece
    tokens: TokenRange
    witness: bytes
    kept: EncodedBlock | None


class ReusingEncoder:
    """Encodes chunks, except for blocks that it has encoded before. For one thread."""

    def __init__(
        self,
        chunks: ChunkEncoder,
        cache: PagedKVCache,
        exact: Codec,
        block_size: int,
        blocks: EncodedBlocks,
    ):
        """`exact`: the codec that sends the cache's own bits; what it encodes is not kept."""
        self._chunks = chunks
        self._cache = cache
        self._exact = exact
        self._block_size = block_size
        self._blocks = blocks

    def encode(
        self, piece: Piece, tokens: TokenRange, slots: np.ndarray, chunk: EncodeChunk
    ) -> list[ChunkBlock]:
        """As `ChunkEncoder.encode`, for a part of `chunk`; the bytes are the same.

        Returns the full blocks that end in it, for `keep`.
        """
        found = self._find(piece, tokens, slots, chunk)
        done = tokens.start
        for kept, run in itertools.groupby(found, lambda block: block.kept is not None):
            if kept:
                same = list(run)
                self._encode(piece, TokenRange(done, same[0].tokens.start), tokens, slots)
                _copy(piece, same)
                done = same[-1].tokens.end
        self._encode(piece, TokenRange(done, tokens.end), tokens, slots)
        return found

    def keep(self, blocks: list[ChunkBlock]) -> None:
        """Keep the tiers of what `encode` returned; of one prompt the end is the first to go."""
        for block in reversed(blocks):
            self._blocks.keep(block.key, block.kept or _encoded(block))

    def _encode(
        self, piece: Piece, part: TokenRange, tokens: TokenRange, slots: np.ndarray
    ) -> None:
        if len(part):
            here = slots[part.start - tokens.start : part.end - tokens.start]
            self._chunks.encode(piece, part, here)

    def _find(
        self, piece: Piece, tokens: TokenRange, slots: np.ndarray, chunk: EncodeChunk
    ) -> list[ChunkBlock]:
        if piece.codec is self._exact or not self._blocks.limit_bytes:
            return []
        size = self._block_size
        first = (chunk.start // size + 1) * size
        ends: dict[int, bytes] = {}
        for end, block_hash in zip(itertools.count(first, size), chunk.hashes, strict=False):
            if block_hash and tokens.start < end <= tokens.end:
                ends[end] = block_hash
            elif ends:
                break  # what is found lies side by side
        if not ends:
            return []
        last = np.array(list(ends)) - 1 - tokens.start
        bits = np.empty((len(ends), self._exact.bytes_per_token(Tier.ANCHOR)), np.uint8)
        self._exact.encode(self._cache, slots[last], {Tier.ANCHOR: bits})
        found = []
        for (end, block_hash), row in zip(ends.items(), bits, strict=True):
            block = piece.tokens.clip(end - size, end)  # without token 0
            key, witness = BlockKey(block_hash, chunk.plan), xxhash.xxh3_128_digest(row.data)
            cached = block.start >= tokens.start and end <= chunk.fresh
            kept = self._blocks.find(key, witness) if cached else None
            found.append(ChunkBlock(key, piece, block, witness, kept))
        return found


def _encoded(block: ChunkBlock) -> EncodedBlock:
    piece, tokens = block.piece, block.tokens
    return EncodedBlock(
        block.witness,
        {tier: piece.view(tier, tokens).copy() for tier in piece.codec.tiers},
        piece.raw_vectors(tokens),
        piece.exact_run(tokens) if piece.exact_bytes else None,
    )


def _copy(piece: Piece, blocks: list[ChunkBlock]) -> None:
    """Put what was kept of adjacent blocks where `ChunkEncoder.encode` would put it."""
    kept = [block.kept for block in blocks if block.kept is not None]
    for block in blocks:
        assert block.kept is not None
        for tier, rows in block.kept.rows.items():
            piece.view(tier, block.tokens)[:] = rows
    if raw := [block.raw for block in kept if block.raw is not None]:
        piece.raw.append(RawVectors.join(raw))
    if exact := [block.exact for block in kept if block.exact is not None]:
        piece.exact_runs.append(ExactRun.join(exact))
