# SPDX-License-Identifier: Apache-2.0
"""One transfer's bytes: which tokens travel with which codec, and the rows that hold them.

Both sides compute the same pieces from the handoff, so that a frame only has to name a tier and a
token range. Token 0 and the last tokens of a prompt travel uncompressed: token 0 takes a third of
the attention, and the last ones are what the first drafts look at most.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from lynx_connector.codec import Codec, Tier
from lynx_connector.codec.types import RowLayout
from lynx_connector.errors import TransferError
from lynx_connector.tiers.raw_vectors import RawVectors

EXACT_ESTIMATE_BITS = {"bfloat16": 3.5, "float16": 6.5, "float32": 19.5}
"""Bits an element that staging reserves for the exact tier before its true size is known: on real
KV it takes 2.7 to 3.4 in bfloat16, and as much more as the dtype has mantissa bits more."""


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


@dataclass(frozen=True)
class ExactRun:
    """The exact tier of a run of tokens.

    lengths: uint32 [tokens], bytes of each; data: uint8, theirs one after the other.
    """

    tokens: TokenRange
    lengths: np.ndarray
    data: np.ndarray

    @property
    def num_bytes(self) -> int:
        """Bytes of lengths and data, as on the wire."""
        return self.lengths.nbytes + self.data.nbytes

    def of(self, start: int, end: int) -> "ExactRun":
        """The part inside [start, end), possibly empty."""
        tokens = self.tokens.clip(start, end)
        low, high = tokens.start - self.tokens.start, tokens.end - self.tokens.start
        ends = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
        return ExactRun(tokens, self.lengths[low:high], self.data[ends[low] : ends[high]])

    @staticmethod
    def join(runs: Sequence["ExactRun"]) -> "ExactRun":
        """Several runs, each beginning where the last one ends, as one; it owns its memory."""
        return ExactRun(
            TokenRange(runs[0].tokens.start, runs[-1].tokens.end),
            np.concatenate([run.lengths for run in runs]),
            np.concatenate([run.data for run in runs]),
        )


@dataclass
class Piece:
    """A run of tokens under one codec, with its rows of every tier.

    `rows[tier]` is uint8 of shape [tokens, codec.bytes_per_token(tier)]. `exact_bytes` is the
    estimate of its exact tier's bytes a token; 0 where it has none.
    """

    tokens: TokenRange
    codec: Codec | RowLayout
    exact_bytes: int = 0
    rows: dict[Tier, np.ndarray] = field(default_factory=dict)
    raw: list[RawVectors] = field(default_factory=list)
    """Vectors that travel raw, in token order."""
    exact_runs: list[ExactRun] = field(default_factory=list)
    """What the producer has encoded of the exact tier, in token order."""

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """Tiers of this piece, anchor first."""
        return (*self.codec.tiers, Tier.EXACT) if self.exact_bytes else self.codec.tiers

    @property
    def num_bytes(self) -> int:
        """Host memory of rows, raw vectors and exact tier (estimated where not encoded yet)."""
        rows = len(self.tokens) * sum(map(self.codec.bytes_per_token, self.codec.tiers))
        raw = sum(part.num_bytes for part in self.raw)
        missing = len(self.tokens) - sum(len(run.tokens) for run in self.exact_runs)
        exact = sum(run.num_bytes for run in self.exact_runs)
        return rows + raw + exact + missing * self.exact_bytes

    def view(self, tier: Tier, tokens: TokenRange) -> np.ndarray:
        """Rows of `tokens`, which must lie inside this piece."""
        return self.rows[tier][tokens.start - self.tokens.start : tokens.end - self.tokens.start]

    def raw_vectors(self, tokens: TokenRange) -> RawVectors | None:
        """Raw vectors of `tokens`; None where there are none (the common case)."""
        found = [part for raw in self.raw if (part := raw.of(tokens.start, tokens.end))]
        return RawVectors.join(found) if found else None

    def exact_run(self, tokens: TokenRange) -> ExactRun:
        """Exact tier of `tokens`, all of which must be encoded."""
        runs = [run for run in self.exact_runs if len(run.tokens.clip(*tokens))]
        return ExactRun.join([run.of(*tokens) for run in runs])


def plan_pieces(
    num_tokens: int,
    first_token: int,
    exact_first: int,
    exact_last: int,
    codec: Codec | RowLayout,
    exact: Codec,
    *,
    exact_tier: bool = False,
) -> list[Piece]:
    """Pieces of tokens [first_token, num_tokens), without rows yet, in token order.

    `exact_tier` adds the exact tier to the pieces that have a residual.
    """
    head = min(exact_first, num_tokens)
    tail = max(head, num_tokens - exact_last)
    spans = [(TokenRange(0, head), exact), (TokenRange(head, tail), codec)]
    spans.append((TokenRange(tail, num_tokens), exact))
    clipped = [(tokens.clip(first_token, num_tokens), used) for tokens, used in spans]
    bits = EXACT_ESTIMATE_BITS[exact.geometry.dtype]
    estimate = int(exact.geometry.elements_per_token * bits / 8)
    return [
        Piece(tokens, used, estimate if exact_tier and len(used.tiers) > 1 else 0)
        for tokens, used in clipped
        if len(tokens)
    ]


@dataclass
class TierBuffers:
    """The pieces of one transfer with memory behind them."""

    pieces: list[Piece]

    @property
    def num_bytes(self) -> int:
        """Host memory of everything encoded; of what the exact tier still lacks, an estimate."""
        return sum(piece.num_bytes for piece in self.pieces)

    @property
    def spare_bytes(self) -> int:
        """The estimated part of `num_bytes`."""
        return sum(len(piece.tokens) * piece.exact_bytes for piece in self.pieces)

    @property
    def tiers(self) -> list[Tier]:
        """Tiers that have any tokens, anchor first."""
        return [tier for tier in Tier if any(tier in piece.tiers for piece in self.pieces)]

    def tier_tokens(self, tier: Tier) -> int:
        """Tokens that have this tier."""
        return sum(len(piece.tokens) for piece in self.pieces if tier in piece.tiers)

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


def slots_of(
    tokens: TokenRange,
    block_ids: Sequence[int],
    first_block: int,
    block_size: int,
    null_block: int | None = None,
) -> np.ndarray:
    """Slot (block_id * block_size + offset) of every token, int64 [tokens].

    `block_ids[0]` holds the tokens from `first_block * block_size` on. `null_block` belongs to
    nobody: it stands where a request has no block.

    Raises:
        TransferError: a token has no block of its own.
    """
    positions = np.arange(tokens.start, tokens.end, dtype=np.int64)
    blocks = positions // block_size - first_block
    table = np.asarray(block_ids, dtype=np.int64)
    if len(blocks) and not 0 <= blocks[0] <= blocks[-1] < len(table):
        raise TransferError(
            f"tokens {tokens.start} to {tokens.end} have no KV blocks of their own: the request "
            f"has {len(table)} blocks from token {first_block * block_size} on"
        )
    used = table[blocks[0] : blocks[-1] + 1] if len(blocks) else table[:0]
    if len(np.unique(used)) != len(used) or (used < 0).any() or null_block in used:
        raise TransferError(
            f"tokens {tokens.start} to {tokens.end} have no KV blocks of their own: vLLM gave "
            "some of them back, or named one twice"
        )
    return table[blocks] * block_size + positions % block_size
