# SPDX-License-Identifier: Apache-2.0
"""Tables for `klt` from KV that was computed anyway: means, covariances, one eigh a head."""

from __future__ import annotations

import numpy as np
import torch
from lynx_kernels.paged import PagedKVCache
from numpy.typing import NDArray

from lynx_connector.codec.base import CodecError, KVGeometry
from lynx_connector.codec.klt_tables import ANCHOR_BITS, MAX_WIDTH, KltTables
from lynx_connector.codec.rotary import Rotary

_BASIS_LIMIT = 1023


class TableLearner:
    """Accumulates statistics of K and V in float64; not thread-safe.

    Raises CodecError for a head_dim that `klt` cannot code (not a multiple of 8).
    """

    def __init__(self, geometry: KVGeometry, rotary: Rotary | None = None) -> None:
        if geometry.head_dim % 8:
            raise CodecError(f"codec klt: head_dim {geometry.head_dim} is not a multiple of 8")
        self.geometry = geometry
        self.tokens = 0
        shape = (geometry.num_layers, 2, geometry.num_kv_heads, geometry.head_dim)
        self._count = torch.zeros(shape[:3], dtype=torch.float64)
        self._sum = torch.zeros(shape, dtype=torch.float64)
        self._square = torch.zeros((*shape, geometry.head_dim), dtype=torch.float64)

    def observe(self, cache: PagedKVCache, slots: NDArray[np.int64], first_position: int) -> None:
        """Add the tokens at `slots`; vectors that are not finite teach nothing."""
        for layer in range(self.geometry.num_layers):
            values = cache.gather(layer, slots).float().cpu()
            finite = values.isfinite().all(dim=-1)
            values = torch.where(finite.unsqueeze(-1), values, 0.0).permute(1, 2, 0, 3)
            self._count[layer] += finite.sum(dim=0)
            self._sum[layer] += values.sum(dim=2)
            self._square[layer] += values.transpose(-1, -2) @ values
        self.tokens += len(slots)

    def build(self) -> KltTables:
        """Tables from what was observed. Raises CodecError before anything was."""
        if not self.tokens:
            raise CodecError("codec klt: no tokens to learn tables from")
        count = self._count.clamp(min=1).unsqueeze(-1)
        mean = self._sum / count
        square = self._square[:, 0] / count[:, 0].unsqueeze(-1)
        covariance = square - mean[:, 0].unsqueeze(-1) * mean[:, 0].unsqueeze(-2)
        variance, vectors = np.linalg.eigh(covariance.numpy())
        variance = np.maximum(variance, 1e-6 * variance[..., -1:] + 1e-12)
        widths = np.stack([_widths(variance, bits) for bits in ANCHOR_BITS])
        widths[0] = np.minimum(widths[0], widths[1])
        span = np.sqrt(variance) * np.exp2(-(widths[1].astype(np.float64) + 4))
        rows = np.swapaxes(vectors, -1, -2) * span[..., None]
        unit = np.abs(rows).max(axis=(-1, -2)) / _BASIS_LIMIT
        while True:
            basis = np.rint(rows / unit[..., None, None]).astype(np.int64)
            sums = (np.abs(basis) << (widths[1].astype(np.int64) + 4)[..., None]).sum(-2).max(-1)
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
        )
        tables.check()
        return tables


def _widths(variance: NDArray[np.float64], bits: int) -> NDArray[np.uint8]:
    """Bits of each component, [.., D]: one more, again and again, for the largest error left."""
    error = variance.reshape(-1, variance.shape[-1]).copy()
    widths = np.zeros(error.shape, dtype=np.uint8)
    rows = np.arange(len(error))
    limit = MAX_WIDTH if bits <= 4 else MAX_WIDTH + 1
    for _ in range(bits * error.shape[-1]):
        best = np.where(widths < limit, error, -1.0).argmax(axis=-1)
        widths[rows, best] += 1
        error[rows, best] /= 4
    return widths.reshape(variance.shape)
