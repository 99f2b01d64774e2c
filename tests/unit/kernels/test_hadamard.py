# SPDX-License-Identifier: Apache-2.0
"""Torch reference of the Hadamard codec: transform, scale, nibbles."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from lynx_kernels.hadamard import reference as hadamard


@pytest.mark.parametrize(("head_dim", "length"), [(64, 64), (80, 16), (96, 32), (192, 64)])
def test_transform_is_the_block_diagonal_hadamard_matrix(head_dim: int, length: int) -> None:
    assert hadamard.transform_length(head_dim) == length
    matrix = torch.ones(1, 1)
    while len(matrix) < length:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    full = torch.block_diag(*[matrix] * (head_dim // length))
    x = torch.randint(-50, 50, (7, head_dim)).float()  # integers: every sum is exact
    assert torch.equal(hadamard.walsh_hadamard(x, length), x @ full.T)


@pytest.mark.parametrize("octave", [-15.6, -3.01, -1, 0, 0.124, 0.125, 0.126, 7.3, 15.99])
def test_scale_is_rounded_up_by_at_most_an_eighth_octave(octave: float) -> None:
    maximum = np.float32(2.0**octave)
    x = torch.zeros(64)
    x[0] = float(maximum) * 8  # one element: every orthonormal coefficient is x / 8
    _, scale, _ = hadamard.encode(x)
    value = 2 ** ((int(scale) - 126) / 8)
    assert maximum <= value * (1 + 1e-6)
    assert value <= maximum * 2 ** (1 / 8) * (1 + 1e-6)


def test_zero_and_tiny_vectors_decode_to_zero() -> None:
    x = torch.stack([torch.zeros(64), torch.full((64,), 1e-40), torch.full((64,), 3e-7)])
    anchor, scale, residual = hadamard.encode(x)
    assert scale.tolist() == [0, 0, 0]
    for tier in (None, residual):
        assert (hadamard.decode(anchor, scale, tier, torch.float32) == 0).all()


def test_small_vectors_keep_a_small_error() -> None:
    x = torch.randn(100, 64) * 1e-6
    anchor, scale, residual = hadamard.encode(x)
    y = hadamard.decode(anchor, scale, residual, torch.float32)
    assert (y - x).abs().max() < 1e-5


def test_vectors_beyond_the_largest_scale_saturate_but_stay_finite() -> None:
    x = torch.full((1, 64), 1e6)
    anchor, scale, residual = hadamard.encode(x)
    assert int(scale) == hadamard.SCALE_MAX
    y = hadamard.decode(anchor, scale, residual, torch.float32)
    assert torch.isfinite(y).all()


def test_float16_reconstruction_does_not_overflow() -> None:
    x = torch.zeros(1, 64, dtype=torch.float16)
    x[0, ::7] = 65504
    parts = hadamard.encode(x)
    assert torch.isfinite(hadamard.decode(*parts, torch.float16)).all()


def test_nibbles_hold_cell_and_place() -> None:
    """The even element's nibble is the low one, and both tiers together are the 8-bit code."""
    x = torch.randn(64)
    anchor, scale, residual = hadamard.encode(x)
    tables = hadamard.hadamard_tables(64)
    u = hadamard.walsh_hadamard(x, 64) / 8 / 2 ** ((int(scale) - 126) / 8)
    code = torch.stack(
        ((anchor & 15) * 16 + (residual & 15), (anchor >> 4) * 16 + (residual >> 4)), dim=-1
    ).flatten()
    level = torch.tensor(tables.code.refined_level)[code.long()]
    widest_part = 47 / 4096  # the outermost cell of the table for 64
    assert (level - u).abs().max() <= widest_part / 2 + 1e-6


@pytest.mark.parametrize("head_dim", [0, 4, 20, 63])
def test_unsupported_head_sizes_are_named(head_dim: int) -> None:
    with pytest.raises(ValueError, match=f"head_dim {head_dim} "):
        hadamard.hadamard_tables(head_dim)


@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_quality_on_gaussian_vectors(head_dim: int) -> None:
    x = torch.randn(4000, head_dim, generator=torch.Generator().manual_seed(3))
    anchor, scale, residual = hadamard.encode(x)

    def vnmse(y: torch.Tensor) -> float:
        return float((y - x).square().sum() / x.square().sum())

    coarse = vnmse(hadamard.decode(anchor, scale, None, torch.float32))
    fine = vnmse(hadamard.decode(anchor, scale, residual, torch.float32))
    assert coarse < 0.0085
    assert fine < 4e-5
    assert math.log2(coarse / fine) > 7  # four more bits: close to 8 octaves of squared error
