# SPDX-License-Identifier: Apache-2.0
"""One transfer as the decode worker receives it: staging filled by the transport thread, drained
into the paged cache by the main thread between steps."""

import threading
import time
from collections import deque
from dataclasses import dataclass

import numpy as np

from lynx_connector import protocol
from lynx_connector.codec import Tier
from lynx_connector.errors import TransferError
from lynx_connector.metadata import LoadRequest
from lynx_connector.transfer import Piece, TierBuffers, TokenRange


@dataclass(frozen=True)
class LandedRows:
    """Rows of one tier, whole and verified, not yet written to the cache."""

    piece: Piece
    tier: Tier
    tokens: TokenRange


class InboundTransfer:
    """Receives the frames of one request; a `Sink` for the transport.

    Frames of one tier arrive in token order without gaps, anchor before residual; anything else is
    refused. `take_landed` and the counters belong to the main thread.
    """

    def __init__(self, load: LoadRequest, buffers: TierBuffers, slots: np.ndarray):
        self.load = load
        self.transfer_id = load.transfer_id
        self.buffers = buffers
        self.slots = slots
        """Slot of token `load.first_token + i` at index i, int64."""
        self.started = time.monotonic()
        self.wire_bytes = dict.fromkeys(buffers.tiers, 0)
        self.written = dict.fromkeys(buffers.tiers, 0)
        self.anchor_reported = False
        self._expected = {tier: self._frames_of(tier) for tier in buffers.tiers}
        self._landed: deque[LandedRows] = deque()
        self._lock = threading.Lock()
        self._failure: str | None = None

    def _frames_of(self, tier: Tier) -> deque[list]:
        """What is still to come of a tier: [piece, next token] in order."""
        pieces = [piece for piece in self.buffers.pieces if tier in piece.codec.tiers]
        return deque([piece, piece.tokens.start] for piece in pieces)

    # ---- transport thread -------------------------------------------------------------

    def buffer(self, frame: protocol.Frame) -> np.ndarray:
        """Staging rows for a frame.

        Raises:
            TransferError: if the frame is not the next one of its tier, or has a wrong size.
        """
        tier = Tier(frame.tier)
        queue = self._expected.get(tier)
        if not queue:
            raise TransferError(f"unexpected {tier.name.lower()} frame")
        piece, next_token = queue[0]
        tokens = TokenRange(frame.first_token, frame.first_token + frame.num_tokens)
        width = piece.codec.bytes_per_token(tier)
        if (
            frame.codec != piece.codec.name
            or tokens.start != next_token
            or tokens.end > piece.tokens.end
            or frame.num_bytes != len(tokens) * width
        ):
            raise TransferError(
                f"malformed {tier.name.lower()} frame: {frame.codec} tokens {tokens.start} to "
                f"{tokens.end} in {frame.num_bytes} bytes, expected {piece.codec.name} from token "
                f"{next_token}, {width} bytes a token"
            )
        return piece.view(tier, tokens).reshape(-1)

    def landed(self, frame: protocol.Frame) -> bool:
        """Queue a verified frame for the main thread; True once every tier is complete."""
        tier = Tier(frame.tier)
        queue = self._expected[tier]
        entry = queue[0]
        tokens = TokenRange(frame.first_token, frame.first_token + frame.num_tokens)
        entry[1] = tokens.end
        if tokens.end == entry[0].tokens.end:
            queue.popleft()
        with self._lock:
            self.wire_bytes[tier] += frame.num_bytes
            self._landed.append(LandedRows(entry[0], tier, tokens))
        return not any(self._expected.values())

    def failed(self, cause: str) -> None:
        """Remember why nothing more will come."""
        with self._lock:
            self._failure = cause

    # ---- main thread ------------------------------------------------------------------

    def take_landed(self) -> LandedRows | None:
        """The oldest rows that are not in the cache yet."""
        with self._lock:
            return self._landed.popleft() if self._landed else None

    @property
    def failure(self) -> str | None:
        """Why the transfer ended early, if it did."""
        with self._lock:
            return self._failure

    def slots_for(self, tokens: TokenRange) -> np.ndarray:
        """Slots of `tokens`."""
        first = self.load.first_token
        return self.slots[tokens.start - first : tokens.end - first]

    def mark_written(self, rows: LandedRows) -> None:
        """Count rows as decoded into the cache."""
        self.written[rows.tier] += len(rows.tokens)

    def complete(self, tier: Tier) -> bool:
        """Whether every row of a tier is in the cache (true for a tier without rows)."""
        if tier not in self.written:
            return True
        rows = sum(len(p.tokens) for p in self.buffers.pieces if tier in p.codec.tiers)
        return self.written[tier] == rows

    @property
    def anchored(self) -> bool:
        """The whole anchor is in the cache."""
        return self.complete(Tier.ANCHOR)

    @property
    def refined(self) -> bool:
        """Every tier is in the cache."""
        return all(self.complete(tier) for tier in self.buffers.tiers)

    def statistics(self) -> dict:
        """Bytes on the wire per tier and seconds since the fetch."""
        with self._lock:
            wire = {tier.name.lower(): count for tier, count in self.wire_bytes.items()}
        return {
            "bytes": sum(wire.values()),
            "wire_bytes": wire,
            "seconds": round(time.monotonic() - self.started, 4),
        }
