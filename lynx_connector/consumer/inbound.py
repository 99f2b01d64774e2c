# SPDX-License-Identifier: Apache-2.0
"""One transfer as the decode worker receives it: staging filled by the transport thread, drained
into the paged cache by the main thread between steps."""

import threading
import time
from collections import deque
from dataclasses import dataclass

import numpy as np

from lynx_connector.codec import KVGeometry, Tier
from lynx_connector.codec.types import DTYPES
from lynx_connector.consumer.budget import Reservation
from lynx_connector.engine.metadata import LoadRequest
from lynx_connector.errors import TransferError, shown
from lynx_connector.tiers.pieces import ExactRun, Piece, TierBuffers, TokenRange
from lynx_connector.tiers.raw_vectors import RawVectors, record_bytes
from lynx_connector.wire import messages

EXACT_MARGIN = 4096
"""Bytes that a token's exact tier may take beyond twice the raw token: a bound against nonsense."""


@dataclass(frozen=True)
class LandedRows:
    """Rows of one tier, whole and verified, not yet written to the cache."""

    piece: Piece
    tier: Tier
    tokens: TokenRange
    exact: ExactRun | None = None
    """Of the exact tier: its bytes, which are not needed any more once applied."""


class InboundTransfer:
    """Receives the frames of one request; a `Sink` for the transport.

    Frames of one tier arrive in token order without gaps, and no token's residual before its
    anchor, or its exact tier before its residual; anything else is refused. `take_landed` and the
    counters belong to the main thread.

    tables: digest of the tables that the rows need, empty if none. geometry: of the cache.
    """

    def __init__(
        self,
        load: LoadRequest,
        buffers: TierBuffers,
        slots: np.ndarray,
        geometry: KVGeometry,
        reservation: Reservation,
        tables: str = "",
    ):
        self.load = load
        self.tables = tables
        self.reservation = reservation
        self._geometry = geometry
        itemsize = DTYPES[geometry.dtype].itemsize
        self._vector_bytes = geometry.head_dim * itemsize
        self._max_exact = EXACT_MARGIN + 2 * geometry.elements_per_token * itemsize
        self.transfer_id = load.transfer_id
        self.buffers = buffers
        self.slots = slots
        """Slot of token `load.first_token + i` at index i, int64."""
        self.started = time.monotonic()
        self.wire_bytes = dict.fromkeys(buffers.tiers, 0)
        self.written = dict.fromkeys(buffers.tiers, 0)
        self.tier_seconds: dict[Tier, float] = {}
        """From the start of the fetch until the whole tier was here."""
        self.anchor_reported = False
        self._expected = {tier: self._frames_of(tier) for tier in buffers.tiers}
        self._landed: deque[LandedRows] = deque()
        self._lock = threading.Lock()
        self._failure: str | None = None
        self._first_token: int | None = None
        self._here = dict.fromkeys(buffers.tiers, load.first_token)
        """Per tier: tokens before this one have landed (where they have the tier)."""

    def _frames_of(self, tier: Tier) -> deque[list]:
        """What is still to come of a tier: [piece, next token] in order."""
        pieces = [piece for piece in self.buffers.pieces if tier in piece.tiers]
        return deque([piece, piece.tokens.start] for piece in pieces)

    # ---- transport thread -------------------------------------------------------------

    def buffer(self, frame: messages.Frame) -> np.ndarray:
        """Memory for a frame: its staging rows, or its own where it carries more than rows.

        Raises:
            TransferError: if the frame is not the next one of its tier, has a wrong size, or finds
                no room.
        """
        tier = Tier(frame.tier)
        queue = self._expected.get(tier)
        if not queue:
            raise TransferError(f"unexpected {tier.name.lower()} frame")
        piece, next_token = queue[0]
        tokens = TokenRange(frame.first_token, frame.first_token + frame.num_tokens)
        least, most = self._size_of(piece, tier, len(tokens), frame.exceptions)
        if (
            frame.codec != piece.codec.name
            or tokens.start != next_token
            or tokens.end > piece.tokens.end
            or not least <= frame.num_bytes <= most
            or frame.exceptions > len(tokens) * self._geometry.vectors_per_token
        ):
            raise TransferError(
                f"malformed {tier.name.lower()} frame: {shown(frame.codec)} tokens "
                f"{tokens.start} to {tokens.end} with {frame.exceptions} exceptions in "
                f"{frame.num_bytes} bytes, expected {piece.codec.name} from token {next_token}, "
                f"{least} to {most} bytes"
            )
        if tier is not Tier.ANCHOR and self._here[Tier(tier - 1)] < tokens.end:
            raise TransferError(
                f"{tier.name.lower()} frame of tokens {tokens.start} to {tokens.end} came before "
                f"their {Tier(tier - 1).name.lower()}"
            )
        if tier is Tier.EXACT:
            self.reservation.use(frame.num_bytes)
        elif frame.exceptions:
            self.reservation.use(frame.exceptions * record_bytes(self._vector_bytes))
        else:
            return piece.view(tier, tokens).reshape(-1)
        return np.empty(frame.num_bytes, np.uint8)

    def _size_of(
        self, piece: Piece, tier: Tier, num_tokens: int, exceptions: int
    ) -> tuple[int, int]:
        """Fewest and most bytes that a frame can have."""
        if tier is Tier.EXACT:
            lengths = 4 * num_tokens
            return lengths, 0 if exceptions else lengths + num_tokens * self._max_exact
        size = num_tokens * piece.codec.bytes_per_token(tier)
        if tier is Tier.ANCHOR:
            size += exceptions * record_bytes(self._vector_bytes)
        elif exceptions:
            return 1, 0
        return size, size

    def landed(self, frame: messages.Frame, payload: np.ndarray) -> bool:
        """Queue a verified frame for the main thread; True once every tier is complete.

        Raises:
            TransferError: exceptions or lengths that do not fit the frame.
        """
        tier = Tier(frame.tier)
        queue = self._expected[tier]
        piece, _ = entry = queue[0]
        tokens = TokenRange(frame.first_token, frame.first_token + frame.num_tokens)
        exact = None
        if tier is Tier.EXACT:
            exact = _exact_run(tokens, payload)
        elif frame.exceptions:
            view = piece.view(tier, tokens).reshape(-1)
            view[:] = payload[: view.nbytes]
            raw = RawVectors.unpack(
                payload[view.nbytes :],
                self._vector_bytes,
                tokens.start,
                len(tokens),
                self._geometry.vectors_per_token,
            )
            piece.raw.append(raw)
        entry[1] = self._here[tier] = tokens.end
        if tokens.end == piece.tokens.end:
            queue.popleft()
        with self._lock:
            if not queue:
                self.tier_seconds[tier] = time.monotonic() - self.started
            self.wire_bytes[tier] += frame.num_bytes
            self._landed.append(LandedRows(piece, tier, tokens, exact))
        return not any(self._expected.values())

    def prefilled(self, first_token: int | None) -> None:
        """Keep the prefill's token for the main thread."""
        with self._lock:
            self._first_token = first_token

    def failed(self, cause: str) -> None:
        """Remember why nothing more will come."""
        with self._lock:
            self._failure = cause

    # ---- main thread ------------------------------------------------------------------

    def take_landed(self) -> LandedRows | None:
        """The oldest rows that are not in the cache yet."""
        with self._lock:
            return self._landed.popleft() if self._landed else None

    def take_first_token(self) -> int | None:
        """The token that the prefill has sampled, once after it came."""
        with self._lock:
            token, self._first_token = self._first_token, None
            return token

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
        if rows.exact is not None:
            self.reservation.reuse(rows.exact.num_bytes)

    def complete(self, tier: Tier) -> bool:
        """Whether every row of a tier is in the cache (true for a tier without rows)."""
        if tier not in self.written:
            return True
        return self.written[tier] == self.buffers.tier_tokens(tier)

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
            seconds = {tier.name.lower(): round(s, 4) for tier, s in self.tier_seconds.items()}
            wire = {tier.name.lower(): count for tier, count in self.wire_bytes.items()}
        return {
            "bytes": sum(wire.values()),
            "wire_bytes": wire,
            "tier_seconds": seconds,
            "seconds": round(time.monotonic() - self.started, 4),
        }


def _exact_run(tokens: TokenRange, payload: np.ndarray) -> ExactRun:
    lengths = payload[: 4 * len(tokens)].view("<u4").astype(np.uint32)
    data = payload[4 * len(tokens) :]
    if int(lengths.sum(dtype=np.int64)) != data.nbytes:
        raise TransferError(
            f"malformed exact frame: lengths add up to {lengths.sum(dtype=np.int64)} bytes, "
            f"{data.nbytes} follow"
        )
    return ExactRun(tokens, lengths, data)
