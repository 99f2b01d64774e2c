# SPDX-License-Identifier: Apache-2.0
"""Tables for `klt` from KV that was computed anyway: means, covariances, one eigh a head.

Where queries were seen as well, the covariance is weighted by what attention reads of K.
"""

from __future__ import annotations

import numpy as np
import torch
from lynx_kernels.klt.reference import K_BITS, MAX_WIDTH
from lynx_kernels.shared.paged import PagedKVCache
from lynx_kernels.shared.rotation import NO_ROTATION, Rotation
from numpy.typing import NDArray

from lynx_connector.codec.klt_tables import ANCHOR_BITS, BASIS_LIMIT, KltTables
from lynx_connector.codec.query_energy import QueryEnergy
from lynx_connector.codec.types import CodecError, KVGeometry


class TableLearner:
    """Accumulates statistics of K and V in float64; not thread-safe.

    Raises CodecError for a head_dim that `klt` cannot code (not a multiple of 16).
    """

    def __init__(self, geometry: KVGeometry, rotation: Rotation = NO_ROTATION) -> None:
        if geometry.head_dim % 16:
            raise CodecError(f"codec klt: head_dim {geometry.head_dim} is not a multiple of 16")
        self.geometry = geometry
        self.rotation = rotation
        self.tokens = 0
        self._queries = QueryEnergy(geometry, rotation)
        shape = (geometry.num_layers, 2, geometry.num_kv_heads, geometry.head_dim)
        self._count = torch.zeros(shape[:3], dtype=torch.float64)
        self._sum = torch.zeros(shape, dtype=torch.float64)
        self._square = torch.zeros((*shape, geometry.head_dim), dtype=torch.float64)

    def observe(self, cache: PagedKVCache, slots: NDArray[np.int64], first_position: int) -> None:
        """Add the tokens at `slots`; vectors that are not finite teach nothing."""
        for layer in range(self.geometry.num_layers):
            values = cache.gather(layer, slots).float().cpu()
            finite = values.isfinite().all(dim=-1)
            values[:, 0] = self.rotation.turn(values[:, 0], first_position, back=True)
            values = torch.where(finite.unsqueeze(-1), values, 0.0).permute(1, 2, 0, 3)
            self._count[layer] += finite.sum(dim=0)
            self._sum[layer] += values.sum(dim=2)
            self._square[layer] += values.transpose(-1, -2) @ values
        self.tokens += len(slots)

    def observe_queries(self, queries: torch.Tensor) -> None:
        """Add queries as `QueryEnergy.observe` takes them."""
        self._queries.observe(queries)

    def build(self) -> KltTables:
        """Tables from what was observed. Raises CodecError before anything was."""
        if not self.tokens:
            raise CodecError("codec klt: no tokens to learn tables from")
        count = self._count.clamp(min=1).unsqueeze(-1)
        mean = self._sum / count
        square = self._square[:, 0] / count[:, 0].unsqueeze(-1)
        covariance = square - mean[:, 0].unsqueeze(-1) * mean[:, 0].unsqueeze(-2)
        weight = self._queries.weight()
        variance, vectors = np.linalg.eigh(weight @ covariance.numpy() @ weight)
        variance = np.maximum(variance, 1e-6 * variance[..., -1:] + 1e-12)
        widths = _widths(
            variance, [bits * self.geometry.head_dim for bits in (*ANCHOR_BITS, K_BITS)]
        )
        total = widths[-1].astype(np.int64)
        span = np.sqrt(variance) * np.exp2(-total.astype(np.float64))
        rows = np.swapaxes(np.linalg.solve(weight, vectors), -1, -2) * span[..., None]
        unit = np.abs(rows).max(axis=(-1, -2)) / BASIS_LIMIT
        while True:
            basis = np.rint(rows / unit[..., None, None]).astype(np.int64)
            sums = (np.abs(basis) << total[..., None]).sum(-2).max(-1)
            if (sums < 1 << 24).all():
                break
            unit = np.where(sums < 1 << 24, unit, unit * 2)
        tables = KltTables(
            self.geometry,
            mean[:, 0].float().numpy(),
            basis.astype(np.int16),
            unit.astype(np.float32),
            widths,
            mean[:, 1].float().numpy(),
            self.rotation,
        )
        tables.check()
        return tables


def _widths(variance: NDArray[np.float64], sums: list[float]) -> NDArray[np.uint8]:
    """Bits of each component, uint8 [len(sums), ..., D]: one more, again and again, for the largest
    error left, noted whenever they add up to one of the ascending `sums`."""
    error = variance.reshape(-1, variance.shape[-1]).copy()
    widths = np.zeros(error.shape, dtype=np.uint8)
    rows = np.arange(len(error))
    noted = []
    for spent in range(1, int(sums[-1]) + 1):
        best = np.where(widths < MAX_WIDTH, error, -1.0).argmax(axis=-1)
        widths[rows, best] += 1
        error[rows, best] /= 4
        if spent in sums:
            noted.append(widths.reshape(variance.shape).copy())
    return np.stack(noted)
