# SPDX-License-Identifier: Apache-2.0
"""One tier of a staged transfer, cut into frames as it is sent."""

import time
from collections import deque
from typing import NamedTuple

import numpy as np

from lynx_connector.codec import Tier
from lynx_connector.tiers.pieces import ExactRun, Piece, TokenRange
from lynx_connector.tiers.staging import StagedTransfer


class OutboundFrame(NamedTuple):
    """What a `Frame` announces: payload is uint8, `exceptions` counts the records at its end."""

    codec: str
    tokens: TokenRange
    payload: np.ndarray
    exceptions: int


class TierStream:
    """What is left to send of one tier of one transfer, from `first_token` on.

    No token leaves before `coarser`, the stream of the tier below on the same connection, has sent
    it: that tier is needed to decode this one.
    """

    def __init__(
        self,
        transfer: StagedTransfer,
        tier: Tier,
        first_token: int,
        coarser: "TierStream | None" = None,
    ):
        self.transfer = transfer
        self.tier = tier
        self.sent_bytes = 0
        self.opened = time.monotonic()
        self._coarser = coarser
        self._left: deque[Piece] = deque(
            piece
            for piece in transfer.buffers.pieces
            if tier in piece.tiers and piece.tokens.end > first_token
        )
        self._next = max(first_token, self._left[0].tokens.start) if self._left else 0

    @property
    def finished(self) -> bool:
        """Nothing is left."""
        return not self._left

    @property
    def ready(self) -> bool:
        """Whether there are encoded tokens to send (or never will be)."""
        return self.transfer.dropped or self._next < self._available

    def waited(self, tokens_done: int) -> float:
        """Seconds since a frame up to there could have been sent: asked for, and encoded."""
        ready = max(self.opened, self.transfer.encoded_at(tokens_done))
        return time.monotonic() - ready

    @property
    def _available(self) -> int:
        """Tokens before this one may be sent."""
        encoded = self.transfer.encoded
        if self._coarser is None or self._coarser.finished:
            return encoded
        return min(encoded, self._coarser._next)

    def take(self, max_bytes: int) -> OutboundFrame:
        """The next frame; only when `ready`, not `finished`, and the transfer is not dropped.

        It has at most `max_bytes` of rows, but at least one token; exceptions come on top.
        """
        piece = self._left[0]
        make = self._exact_frame if self.tier is Tier.EXACT else self._row_frame
        frame = make(piece, max_bytes)
        self._next = frame.tokens.end
        if self._next == piece.tokens.end:
            self._left.popleft()
            if self._left:
                self._next = self._left[0].tokens.start
        self.sent_bytes += frame.payload.nbytes
        return frame

    def _row_frame(self, piece: Piece, max_bytes: int) -> OutboundFrame:
        step = max(1, max_bytes // piece.codec.bytes_per_token(self.tier))
        tokens = TokenRange(self._next, min(self._next + step, piece.tokens.end, self._available))
        payload = piece.view(self.tier, tokens).reshape(-1)
        raw = piece.raw_vectors(tokens) if self.tier is Tier.ANCHOR else None
        if raw is None:
            return OutboundFrame(piece.codec.name, tokens, payload, 0)
        payload = np.concatenate([payload, raw.pack(tokens.start)])
        return OutboundFrame(piece.codec.name, tokens, payload, len(raw))

    def _exact_frame(self, piece: Piece, max_bytes: int) -> OutboundFrame:
        run = self._run_of(piece)
        skip = self._next - run.tokens.start
        ends = np.cumsum(run.lengths, dtype=np.int64)
        begin = int(ends[skip - 1]) if skip else 0
        # Each token costs its data and the four bytes of its length.
        sizes = ends[skip:] - begin + run.lengths.itemsize * np.arange(1, len(ends) - skip + 1)
        count = max(1, int(np.searchsorted(sizes, max_bytes, "right")))
        count = min(count, self._available - self._next)
        lengths = run.lengths[skip : skip + count].astype("<u4")
        data = run.data[begin : int(ends[skip + count - 1])]
        tokens = TokenRange(self._next, self._next + count)
        payload = np.concatenate([lengths.view(np.uint8), data])
        return OutboundFrame(piece.codec.name, tokens, payload, 0)

    def _run_of(self, piece: Piece) -> ExactRun:
        return next(run for run in piece.exact_runs if run.tokens.end > self._next)
