# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding as plane rotations by whole steps of a turn.

Every RoPE that keeps its frequencies for all positions (plain, Llama 3, YaRN, linear and NTK
scaling, partial rotary) turns pair i at position p by p * frequency[i]. Here a frequency is a whole
number of 2^-32 turns, so that angles are exact integers, and cosines are rounded to multiples of
2^-14, so that both ends of a transfer compute the same. YaRN's factor on cos and sin scales all
keys alike and is left to the codec's own scale.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

_TURN = 1 << 32
_UNIT = 1 << 14
_CHECKED_POSITIONS = 4096
_TOLERANCE = 1 / 64  # cos and sin of a bfloat16 model are off by 1/512, the radius included


@dataclass(frozen=True)
class Rotation:
    """steps: per pair, 2^-32 turns a position, each in [0, 2^32); is_neox: pair i is elements
    (i, i + pairs), else (2 i, 2 i + 1). Elements from 2 * pairs on are not rotated."""

    steps: tuple[int, ...]
    is_neox: bool

    @property
    def pairs(self) -> int:
        return len(self.steps)

    def cos_sin(self, first: int, count: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """cos and sin at positions first and up: float32 [pairs, count] each."""
        return self.cos_sin_at(np.arange(first, first + count, dtype=np.uint64))

    def cos_sin_at(
        self, positions: NDArray[np.uint64]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """cos and sin at positions [P]: float32 [pairs, P] each."""
        steps = np.array(self.steps, dtype=np.uint64)[:, None]
        turns = steps * positions % np.uint64(_TURN)
        angles = turns * (2 * math.pi / _TURN)
        unit = np.float32(_UNIT)
        return (
            np.rint(np.cos(angles) * _UNIT).astype(np.float32) / unit,
            np.rint(np.sin(angles) * _UNIT).astype(np.float32) / unit,
        )

    @functools.cached_property
    def _order(self) -> torch.Tensor:
        """First elements of all pairs, then the second ones, then what is not rotated."""
        pairs = torch.arange(self.pairs)
        return torch.cat(
            (pairs, pairs + self.pairs) if self.is_neox else (2 * pairs, 2 * pairs + 1)
        )

    @property
    def elements(self) -> tuple[list[int], list[int]]:
        """First and second element of every pair."""
        one, two = self._order.split(self.pairs) if self.pairs else (self._order, self._order)
        return one.tolist(), two.tolist()

    def turn(self, x: torch.Tensor, first: int, *, back: bool = False) -> torch.Tensor:
        """x [T, ..., D] float32 at positions first and up, rotated (or rotated back).

        Two products and one sum an element, each rounded: what the kernels do.
        """
        if not self.pairs:
            return x
        shape = (len(x), *(1,) * (x.ndim - 2), self.pairs)
        cos, sin = (
            torch.from_numpy(table.T.copy()).to(x.device).view(shape)
            for table in self.cos_sin(first, len(x))
        )
        one, two = self._order.to(x.device).split(self.pairs)
        a, b = x[..., one], x[..., two]
        turned = x.clone()
        turned[..., one] = a * cos + b * sin if back else a * cos - b * sin
        turned[..., two] = b * cos - a * sin if back else b * cos + a * sin
        return turned


NO_ROTATION = Rotation((), True)


def fit_rotation(cos_sin: torch.Tensor, is_neox: bool) -> Rotation | None:
    """The rotation behind a model's own table, [positions, 2 * pairs]: cos, then sin.

    vllm/model_executor/layers/rotary_embedding/base.py holds such a table in the model's dtype. A
    pair's frequency is read off its angle at position 1 and corrected at 2, 4, 8, ... None where
    angles are not proportional to the position (several frequencies by length, more dimensions).
    """
    if cos_sin.ndim != 2 or cos_sin.shape[0] < 4 or cos_sin.shape[1] % 2:
        return None
    cos, sin = cos_sin.detach().cpu().double().numpy().T.reshape(2, -1, cos_sin.shape[0])
    angle = np.arctan2(sin, cos)
    frequency = angle[:, 1].copy()
    position = 2
    while position < angle.shape[1]:
        off = angle[:, position] - frequency * position
        frequency += (np.mod(off + math.pi, 2 * math.pi) - math.pi) / position
        position *= 2
    steps = np.rint(frequency / (2 * math.pi) * _TURN).astype(np.int64) % _TURN
    found = Rotation(tuple(steps.tolist()), is_neox)
    stride = max(1, angle.shape[1] // _CHECKED_POSITIONS)
    radius = np.hypot(cos, sin).mean()
    expected = found.cos_sin_at(np.arange(0, angle.shape[1], stride, dtype=np.uint64))
    checked = cos[:, ::stride], sin[:, ::stride]
    off = np.abs(np.stack(checked) / radius - np.stack(expected)).max()
    return found if off < _TOLERANCE else None
