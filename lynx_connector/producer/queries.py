# SPDX-License-Identifier: Apache-2.0
"""A few queries of each prefill step, kept for the tables of `klt`.

No connector hook shows queries, so attention itself is tapped while there is something to learn
(`compat.tap_queries`). Rows of a batch are told apart by the slots that their K is written to.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from lynx_kernels.shared.rotation import Rotation

from lynx_connector.codec.query_energy import QUERY_STRIDE
from lynx_connector.engine.metadata import EncodeChunk
from lynx_connector.errors import TransferError
from lynx_connector.tiers.pieces import TokenRange, slots_of

logger = logging.getLogger("vllm.lynx.tables")

MAX_SAMPLES = 256
"""Queries kept of one step at most, of each layer: those of an 8B model take 64 MiB."""


class QuerySample(NamedTuple):
    """Queries of some tokens of one step, as attention saw them (after RoPE).

    slots: int64 [n] of their tokens; layers: L tensors [n, query heads, D] on the cache's device.
    """

    slots: torch.Tensor
    positions: dict[int, int]
    """Position by slot."""
    layers: list[torch.Tensor]

    def before_rope(self, rotation: Rotation) -> torch.Tensor:
        """float32 [n, L, query heads, D], on the CPU."""
        queries = torch.stack([layer.float().cpu() for layer in self.layers], dim=1)
        for row, slot in enumerate(self.slots.tolist()):
            own = queries[row : row + 1]
            queries[row : row + 1] = rotation.turn(own, self.positions[slot], back=True)
        return queries


class QuerySampler:
    """Between `expect` and `take` lies one forward pass. For the worker's main thread.

    Whatever goes wrong with the samples costs the samples, never the pass.

    tap: has every attention layer's (index, query, slot mapping) shown to a function, and returns
    what ends that.
    """

    def __init__(
        self,
        num_layers: int,
        block_size: int,
        tap: Callable[[Callable[[int, Any, Any], None]], Callable[[], None]],
    ):
        self._num_layers = num_layers
        self._block_size = block_size
        self._positions: dict[int, int] = {}
        self._rows: torch.Tensor | None = None
        self._slots: torch.Tensor | None = None
        self._layers: dict[int, torch.Tensor] = {}
        self._broken = False
        self._untap = tap(self._see)

    def expect(self, chunks: Sequence[EncodeChunk]) -> None:
        """Before the forward pass that computes these chunks."""
        self._positions, self._rows, self._slots, self._layers = {}, None, None, {}
        if self._broken:
            return
        for chunk in chunks:
            tokens = TokenRange(max(chunk.start, chunk.fresh), chunk.end)
            if not len(tokens):
                continue
            first_block = chunk.start // self._block_size
            try:
                slots = slots_of(tokens, chunk.block_ids, first_block, self._block_size)
            except TransferError:
                continue  # its encoding fails, and says why
            room = max(MAX_SAMPLES - len(self._positions), 0)
            count = min(-(-len(tokens) // QUERY_STRIDE), room)
            picked = np.linspace(0, len(tokens) - 1, count).astype(np.int64)
            self._positions |= {
                int(slots[index]): tokens.start + int(index) for index in picked.tolist()
            }

    def _see(self, layer: int, query: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        if not self._positions:
            return
        try:
            if self._rows is None:
                wanted = torch.tensor(list(self._positions), device=slot_mapping.device)
                self._rows = torch.isin(slot_mapping, wanted).nonzero().squeeze(1)
                self._slots = slot_mapping[self._rows]
            self._layers[layer] = query[self._rows].detach()
        except Exception:
            logger.exception(
                "lynx: attention's queries cannot be read: klt's tables are learned from K alone "
                "and its drafts are a little worse; no request is affected"
            )
            self._positions, self._broken = {}, True

    def take(self) -> QuerySample | None:
        """After the forward pass; None where it showed nothing."""
        positions, slots, layers = self._positions, self._slots, self._layers
        self._positions, self._slots, self._layers = {}, None, {}
        if slots is None or not len(slots) or len(layers) != self._num_layers:
            return None
        return QuerySample(slots, positions, [layers[i] for i in range(self._num_layers)])

    def close(self) -> None:
        """Leave attention as it was."""
        self._untap()
