# SPDX-License-Identifier: Apache-2.0
"""CacheGen's quantizer: anchor tokens, deltas to them, an entropy coder whose size is computed.

Liu et al., "CacheGen: KV Cache Compression and Streaming for Fast Large Language Model Serving",
SIGCOMM 2024, arXiv 2310.07240: groups of ten tokens; the first is the anchor, in 8 bits, the other
nine are coded as differences to it, more coarsely in deeper layers; an arithmetic coder with one
distribution per layer and channel.

The paper's bin sizes (0.5, 1 and 1.5 for thirds of the layers) have no stated unit. Levels are
therefore those of the authors' released configuration for 7B models: K 32 in the first third of the
layers and 16 behind it, V 32 in the first sixteenth and 16 behind it, over the range of one token's
vector of one layer (all heads), with one float16 maximum for each.

Size: empirical entropy of the symbols of each layer, K or V, and channel, measured on the very
symbols that are coded. An arithmetic coder comes within a fraction of a percent of it, but needs
the distributions: the paper profiles them offline per model and sends none. Of few tokens they fit
too well, so that the size is a lower bound, in CacheGen's favour.

Bound: an anchor token errs by at most 1/254 of its vector's maximum, another by at most
1 / (levels - 2) of its difference's maximum, plus what float16 loses of that.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from lynx_connector.bench.baselines.base import SCALE_BITS, Baseline, Code

GROUP = 10
ANCHOR_LEVELS = 256


class CacheGen(Baseline):
    name: ClassVar[str] = "cachegen"

    def encode(self, values: torch.Tensor) -> Code:
        x = values.float()
        tokens = torch.arange(len(x))
        is_anchor = tokens % GROUP == 0
        anchors = _Symbols.of(x[is_anchor], torch.tensor(float(ANCHOR_LEVELS)))
        # Differences to what the decoder has: errors do not add up.
        base = anchors.values()[tokens // GROUP]
        levels = delta_levels(x.shape[1])[:, :, None, None]
        deltas = _Symbols.of((x - base)[~is_anchor], levels)
        return Code((anchors.bits() + deltas.bits(),), (anchors, deltas))

    def decode(self, code: Code, tiers: int) -> torch.Tensor:
        anchors, deltas = code.data
        values = anchors.values()
        tokens = torch.arange(len(anchors.symbols) + len(deltas.symbols))
        decoded = values[tokens // GROUP]
        decoded[tokens % GROUP != 0] += deltas.values()
        return decoded


def delta_levels(layers: int) -> torch.Tensor:
    """Levels of the deltas: float32 [L, 2]."""
    levels = torch.full((layers, 2), 16.0)
    levels[: -(-layers // 3), 0] = 32
    levels[: -(-layers // 16), 1] = 32
    return levels


class _Symbols:
    """Symmetric integers over the range of one token's vector of one layer (K or V, all heads)."""

    def __init__(self, symbols: torch.Tensor, maximum: torch.Tensor, half: torch.Tensor) -> None:
        self.symbols, self.maximum, self.half = symbols, maximum, half

    @classmethod
    def of(cls, x: torch.Tensor, levels: torch.Tensor) -> _Symbols:
        half = levels / 2 - 1
        maximum = x.abs().amax(dim=(-2, -1), keepdim=True).half().float()
        scaled = torch.where(maximum > 0, x * half / maximum, 0.0)
        return cls(torch.minimum(torch.maximum(scaled.round(), -half), half), maximum, half)

    def values(self) -> torch.Tensor:
        return self.symbols / self.half * self.maximum

    def bits(self) -> float:
        return entropy_bits(self.symbols) + SCALE_BITS * self.maximum.numel()


def entropy_bits(symbols: torch.Tensor) -> float:
    """Bits of an ideal coder for integer symbols [T, ...], one distribution per column."""
    columns = symbols.flatten(1).to(torch.int64)
    if not columns.numel():
        return 0.0
    columns = columns - columns.min()
    width = int(columns.max()) + 1
    which = torch.arange(columns.shape[1]) * width
    counts = torch.bincount((columns + which).flatten(), minlength=width * columns.shape[1])
    used = counts[counts > 0].double()
    tokens = len(columns)
    return float((used * (tokens / used).log2()).sum())
