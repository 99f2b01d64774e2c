# SPDX-License-Identifier: Apache-2.0
"""Which errors of K attention feels: those along which its queries are large.

A score is q . k, so an error e of K moves it by q . e. K is coded before RoPE, where a query at
distance d reads as itself turned by d; the second moments of queries are averaged over distances.
Their square root weighs the KLT: the full moments make scores best, and nothing at all K itself;
between the two the drafts are best (half of the KL that plain K gives, measured on SmolLM2-135M).
"""

from __future__ import annotations

import numpy as np
import torch
from lynx_kernels.shared.rotation import Rotation
from numpy.typing import NDArray

from lynx_connector.codec.types import KVGeometry

QUERY_STRIDE = 4
"""One token of so many shows its queries while tables are learned."""

_DISTANCES = (0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610, 987, 1500)
_FLOOR = 1e-3
"""Least energy of a direction, as a part of the largest one's."""


class QueryEnergy:
    """Second moments of queries by KV head, in float64; not thread-safe."""

    def __init__(self, geometry: KVGeometry, rotation: Rotation) -> None:
        self._rotation = rotation
        self._heads, self._head_dim = geometry.num_kv_heads, geometry.head_dim
        shape = (geometry.num_layers, self._heads, self._head_dim, self._head_dim)
        self._square = torch.zeros(shape, dtype=torch.float64)
        self.count = 0
        """Tokens observed."""

    def observe(self, queries: torch.Tensor) -> None:
        """Add queries [T, L, query heads, D] as they are before RoPE (after it where K's rotation
        is not known); those that are not finite teach nothing."""
        finite = queries.isfinite().all(dim=-1, keepdim=True)
        values = torch.where(finite, queries.double(), 0.0)
        # Query heads of one KV head are neighbours.
        grouped = values.unflatten(2, (self._heads, -1)).permute(1, 2, 0, 3, 4).flatten(2, 3)
        self._square += grouped.transpose(-1, -2) @ grouped
        self.count += len(queries)

    def weight(self) -> NDArray[np.float64]:
        """A symmetric, invertible matrix [L, H, D, D] whose product with an error counts; the
        identity where nothing was observed."""
        if not self.count:
            return np.broadcast_to(np.eye(self._head_dim), self._square.shape).copy()
        energy, directions = np.linalg.eigh(self._over_distances())
        least = np.maximum(_FLOOR * energy[..., -1:], np.finfo(np.float64).tiny)
        root = np.maximum(energy, least) ** 0.25
        root /= root.mean(axis=-1, keepdims=True)
        return (directions * root[..., None, :]) @ np.swapaxes(directions, -1, -2)

    def _over_distances(self) -> NDArray[np.float64]:
        square = self._square / self._square.amax().clamp(min=torch.finfo(torch.float64).tiny)
        total = np.zeros(square.shape)
        for distance in _DISTANCES:
            rows = self._turn(square.float(), distance)
            total += self._turn(rows.transpose(-1, -2), distance).double().numpy()
        return (total + np.swapaxes(total, -1, -2)) / (2 * len(_DISTANCES))

    def _turn(self, rows: torch.Tensor, distance: int) -> torch.Tensor:
        return self._rotation.turn(rows.unsqueeze(0), distance)[0]
