# SPDX-License-Identifier: Apache-2.0
"""Words that every codec and its users share: tiers, the shape of a shard, rows, errors."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lynx_connector.errors import LynxError

DTYPES: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}

Rows = NDArray[np.uint8]


class CodecError(LynxError, ValueError):
    """A codec was asked for something that it cannot do; the text names it."""


class Tier(enum.IntEnum):
    """Precision tiers in the order in which they are sent. Numbers are part of the protocol."""

    ANCHOR = 0
    RESIDUAL = 1
    EXACT = 2


@dataclass(frozen=True)
class KVGeometry:
    """One worker's shard of the KV cache, without its block structure.

    dtype: "bfloat16", "float16" or "float32"; head_dim is the same for K and V.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str

    @property
    def elements_per_token(self) -> int:
        """Elements of K and V of one token over all layers and heads."""
        return self.vectors_per_token * self.head_dim

    @property
    def vectors_per_token(self) -> int:
        """Head vectors (layer, K or V, head) of one token."""
        return self.num_layers * 2 * self.num_kv_heads


@dataclass(frozen=True)
class RowLayout:
    """Names and row widths of a codec whose tables are not here yet: enough to receive its rows."""

    name: str
    widths: Mapping[Tier, int]

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """As `Codec.tiers`."""
        return tuple(self.widths)

    def bytes_per_token(self, tier: Tier) -> int:
        """As `Codec.bytes_per_token`."""
        return self.widths[tier]
