# SPDX-License-Identifier: Apache-2.0
"""Vectors that a codec cannot hold (NaN, infinity, overflow) and that therefore travel raw.

They ride behind the rows of an anchor frame, one record each: token offset inside the frame and
vector index as little-endian uint32, then head_dim * itemsize bytes as they lie in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lynx_connector.errors import TransferError


def _record(width: int) -> np.dtype:
    return np.dtype([("token", "<u4"), ("vector", "<u4"), ("data", "u1", (width,))])


def record_bytes(width: int) -> int:
    """Bytes of one record with a vector of `width` bytes."""
    return _record(width).itemsize


@dataclass(frozen=True)
class RawVectors:
    """tokens, vectors: int64 [n], position in the prompt and vector index as in
    `PagedKVCache.gather_vectors`, ascending by both; data: uint8 [n, head_dim * itemsize]."""

    tokens: np.ndarray
    vectors: np.ndarray
    data: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_bytes(self) -> int:
        """Bytes on the wire."""
        return len(self) * record_bytes(self.data.shape[1])

    def of(self, start: int, end: int) -> RawVectors:
        """Those of tokens [start, end)."""
        low, high = np.searchsorted(self.tokens, (start, end))
        return RawVectors(self.tokens[low:high], self.vectors[low:high], self.data[low:high])

    @staticmethod
    def join(parts: Sequence[RawVectors]) -> RawVectors:
        """Several runs, in token order, as one; it owns its memory."""
        return RawVectors(
            np.concatenate([part.tokens for part in parts]),
            np.concatenate([part.vectors for part in parts]),
            np.concatenate([part.data for part in parts]),
        )

    def pack(self, first_token: int) -> np.ndarray:
        """Records for a frame that begins at `first_token`, as uint8 [bytes]."""
        records = np.empty(len(self), _record(self.data.shape[1]))
        records["token"] = self.tokens - first_token
        records["vector"] = self.vectors
        records["data"] = self.data
        return records.view(np.uint8)

    @staticmethod
    def unpack(
        payload: np.ndarray, width: int, first_token: int, num_tokens: int, num_vectors: int
    ) -> RawVectors:
        """Inverse of `pack` for what a peer sent; the result owns its memory.

        Raises:
            TransferError: a token outside the frame, a vector outside the cache, or records that
                are not strictly ascending.
        """
        records = payload.view(_record(width))
        tokens = records["token"].astype(np.int64)
        vectors = records["vector"].astype(np.int64)
        if len(records) and (tokens.max() >= num_tokens or vectors.max() >= num_vectors):
            raise TransferError(
                f"malformed exceptions: token {tokens.max()} of {num_tokens}, vector "
                f"{vectors.max()} of {num_vectors}"
            )
        if (np.diff(tokens * num_vectors + vectors) <= 0).any():
            raise TransferError("malformed exceptions: not in ascending order")
        return RawVectors(tokens + first_token, vectors, records["data"].copy())
