# SPDX-License-Identifier: Apache-2.0
"""What holds for every comparison codec. A new one states its bounds below and is tested."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lynx_connector.bench.baselines import BASELINES, Baseline
from lynx_connector.bench.baselines.cachegen import delta_levels, entropy_bits
from lynx_connector.bench.methods import BaselineMethod

LAYERS, HEADS, HEAD_DIM = 6, 2, 64

# Mean squared error over mean square on Gaussian vectors, by number of tiers decoded.
VNMSE_BOUND = {
    "kivi-4bit-g64": [1.1e-2],
    "kivi-2bit-g32": [2.0e-1],
    "quantspec-4+4": [1.2e-2, 6e-5],
    "cachegen": [5e-2],
}
# Bits an element, cumulative, for 128 tokens and HEAD_DIM; entropy-coded: at most.
BITS = {
    "kivi-4bit-g64": [4.5],
    "kivi-2bit-g32": [3.0],
    "quantspec-4+4": [4 + (32 / 128 + 32 / 64) / 2, 8 + (32 / 128 + 32 / 64) / 2],
    # Anchors 8 bits; deltas log2(31) or log2(15); a maximum per 128 elements.
    "cachegen": [5.2],
}
ENTROPY_CODED = ("cachegen",)


@pytest.fixture(params=BASELINES)
def baseline(request: pytest.FixtureRequest) -> Baseline:
    return BASELINES[request.param]()


def gaussian(tokens: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    shape = (tokens, LAYERS, 2, HEADS, HEAD_DIM)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def reconstructions(baseline: Baseline, values: torch.Tensor) -> list[torch.Tensor]:
    code = baseline.encode(values)
    return [baseline.decode(code, tiers) for tiers in range(1, len(code.bits) + 1)]


@pytest.mark.parametrize("tokens", [1, 9, 10, 11, 64, 128, 300])
def test_round_trip_error_is_bounded(baseline, tokens):
    values = gaussian(tokens, seed=tokens)
    found = reconstructions(baseline, values)
    assert len(found) == len(VNMSE_BOUND[baseline.name])
    for decoded, bound in zip(found, VNMSE_BOUND[baseline.name], strict=True):
        assert decoded.shape == values.shape
        error = (decoded - values).square().sum() / values.square().sum()
        assert float(error) <= bound


def test_bits(baseline):
    values = gaussian(128)
    bits = [size / values.numel() for size in baseline.encode(values).bits]
    expected = BITS[baseline.name]
    if baseline.name in ENTROPY_CODED:
        assert len(bits) == len(expected)
        assert all(2 < size <= most for size, most in zip(bits, expected, strict=True))
    else:
        assert bits == pytest.approx(expected)


def test_a_constant_is_kept(baseline):
    values = torch.full((40, LAYERS, 2, HEADS, HEAD_DIM), 0.75)
    for decoded in reconstructions(baseline, values):
        torch.testing.assert_close(decoded, values, rtol=1e-2, atol=0)
    zeros = torch.zeros_like(values)
    for decoded in reconstructions(baseline, zeros):
        assert torch.equal(decoded, zeros)


def test_a_later_tier_is_better(baseline):
    values = gaussian(200, seed=3)
    errors = [float((d - values).square().sum()) for d in reconstructions(baseline, values)]
    assert errors == sorted(errors, reverse=True)


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 1000), scale=st.floats(1e-2, 1e2), tokens=st.integers(1, 130),
    shift=st.floats(-10, 10),
)  # fmt: skip
@pytest.mark.parametrize("name", ["kivi-4bit-g64", "kivi-2bit-g32", "quantspec-4+4"])
def test_no_element_errs_by_more_than_half_a_step(name, seed, scale, tokens, shift):
    values = gaussian(tokens, seed, scale) + shift * scale
    bits = 2 if "2bit" in name else 4
    # A group's range is at most that of its channel (K) or vector (V).
    k, v = values.unbind(2)
    widths = [x.amax(dim) - x.amin(dim) for x, dim in ((k, 0), (v, -1))]
    span = torch.stack((widths[0].expand_as(k), widths[1].unsqueeze(-1).expand_as(v)), dim=2)
    # float16 keeps 11 bits of zero point and of scale.
    slack = 2**-10 * values.abs().max() + 2**-10 * span + 1e-6
    found = reconstructions(BASELINES[name](), values)
    for decoded, parts in zip(found, (2, 16), strict=False):
        bound = span / (2**bits - 1) / parts + slack
        assert bool(((decoded - values).abs() <= bound).all())


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000), scale=st.floats(1e-2, 1e2), tokens=st.integers(1, 45))
def test_cachegen_errs_by_its_stated_bound(seed, scale, tokens):
    values = gaussian(tokens, seed, scale)
    (decoded,) = reconstructions(BASELINES["cachegen"](), values)
    number = torch.arange(tokens)
    is_anchor = number % 10 == 0
    maximum = values.abs().amax(dim=(-2, -1), keepdim=True)
    error = (decoded - values).abs()
    slack = 2**-10 * maximum.max()
    assert bool((error[is_anchor] <= (maximum / 254 + slack)[is_anchor]).all())
    base = decoded[is_anchor][number // 10]
    difference = (values - base).abs().amax(dim=(-2, -1), keepdim=True)
    bound = difference / (delta_levels(LAYERS)[:, :, None, None] - 2) + 2 * slack
    assert bool((error <= bound + maximum / 254).all())


def test_cachegen_is_coarser_in_deeper_layers():
    levels = delta_levels(30)
    assert levels[:, 0].tolist() == [32] * 10 + [16] * 20
    assert levels[:, 1].tolist() == [32] * 2 + [16] * 28


def test_entropy_by_hand():
    # One column of two equally frequent symbols, one of a single symbol, one of four.
    symbols = torch.tensor([[-3, 5, 0], [7, 5, 1], [-3, 5, 2], [7, 5, 3]])
    assert entropy_bits(symbols) == pytest.approx(4 * (1 + 0 + 2))
    assert entropy_bits(torch.zeros(0, 4)) == 0


@settings(deadline=None)
@given(seed=st.integers(0, 1000), levels=st.integers(1, 40), tokens=st.integers(1, 50))
def test_entropy_is_at_most_the_plain_size(seed, levels, tokens):
    symbols = torch.randint(levels, (tokens, 7), generator=torch.Generator().manual_seed(seed))
    assert -1e-6 <= entropy_bits(symbols) <= tokens * 7 * math.log2(levels) + 1e-6


def test_nothing_to_send_costs_nothing(baseline):
    empty = gaussian(0)
    sent = BaselineMethod(baseline).deliver(empty, 5)
    assert (sent.anchor_bits, sent.total_bits) == (0, 0)
    assert sent.anchor.shape == empty.shape
