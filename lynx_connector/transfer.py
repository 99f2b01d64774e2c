# SPDX-License-Identifier: Apache-2.0
"""One transfer's bytes: which tokens travel with which codec, and the rows that hold them.

Both sides compute the same pieces from the handoff, so that a frame only has to name a tier and a
token range. Token 0 and the last tokens of a prompt travel uncompressed: token 0 takes a third of
the attention, and the last ones are what the first drafts look at most.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from lynx_connector.codec import Codec, Tier


class TokenRange(NamedTuple):
    """Tokens [start, end) of a prompt."""

    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start

    def clip(self, start: int, end: int) -> "TokenRange":
        """The part inside [start, end), possibly empty."""
        low = min(max(self.start, start), self.end)
        return TokenRange(low, max(low, min(self.end, end)))


@dataclass
class Piece:
    """A run of tokens under one codec, with its rows of every tier.

    `rows[tier]` is uint8 of shape [tokens, codec.bytes_per_token(tier)].
    """

    tokens: TokenRange
    codec: Codec
    rows: dict[Tier, np.ndarray] = field(default_factory=dict)

    def view(self, tier: Tier, tokens: TokenRange) -> np.ndarray:
        """Rows of `tokens`, which must lie inside this piece."""
        return self.rows[tier][tokens.start - self.tokens.start : tokens.end - self.tokens.start]


def plan_pieces(
    num_tokens: int, first_token: int, exact_first: int, exact_last: int, codec: Codec, exact: Codec
) -> list[Piece]:
    """Pieces of tokens [first_token, num_tokens), without rows yet, in token order."""
    head = min(exact_first, num_tokens)
    tail = max(head, num_tokens - exact_last)
    spans = [(TokenRange(0, head), exact), (TokenRange(head, tail), codec)]
    spans.append((TokenRange(tail, num_tokens), exact))
    clipped = [(tokens.clip(first_token, num_tokens), used) for tokens, used in spans]
    return [Piece(tokens, used) for tokens, used in clipped if len(tokens)]


@dataclass
class TierBuffers:
    """The pieces of one transfer with memory behind them."""

    pieces: list[Piece]

    @property
    def num_bytes(self) -> int:
        """Host memory that `allocate` takes."""
        return sum(self.tier_bytes(tier) for tier in Tier)

    def tier_bytes(self, tier: Tier) -> int:
        """Bytes of one tier."""
        return sum(
            len(piece.tokens) * piece.codec.bytes_per_token(tier)
            for piece in self.pieces
            if tier in piece.codec.tiers
        )

    @property
    def tiers(self) -> list[Tier]:
        """Tiers that have any rows, anchor first."""
        return [tier for tier in Tier if self.tier_bytes(tier)]

    def allocate(self) -> None:
        """Make room for every row (untouched pages cost nothing until written)."""
        for piece in self.pieces:
            for tier in piece.codec.tiers:
                shape = (len(piece.tokens), piece.codec.bytes_per_token(tier))
                piece.rows[tier] = np.empty(shape, np.uint8)

    def overlapping(self, tokens: TokenRange) -> Iterator[tuple[Piece, TokenRange]]:
        """Every piece that shares tokens with `tokens`, and the shared range."""
        for piece in self.pieces:
            shared = piece.tokens.clip(*tokens)
            if len(shared):
                yield piece, shared

    def frames(
        self, tier: Tier, first_token: int, frame_bytes: int
    ) -> Iterator[tuple[Piece, TokenRange]]:
        """Cut one tier from `first_token` on into frames of at most `frame_bytes` (>= 1 token)."""
        for piece in self.pieces:
            if tier not in piece.codec.tiers:
                continue
            step = max(1, frame_bytes // piece.codec.bytes_per_token(tier))
            start = max(piece.tokens.start, first_token)
            while start < piece.tokens.end:
                yield piece, TokenRange(start, min(start + step, piece.tokens.end))
                start += step


def slots_of(
    tokens: TokenRange, block_ids: list[int], first_block: int, block_size: int
) -> np.ndarray:
    """Slot (block_id * block_size + offset) of every token, int64 [tokens].

    `block_ids[0]` holds the tokens from `first_block * block_size` on.
    """
    positions = np.arange(tokens.start, tokens.end, dtype=np.int64)
    table = np.asarray(block_ids, dtype=np.int64)
    return table[positions // block_size - first_block] * block_size + positions % block_size
