# SPDX-License-Identifier: Apache-2.0
"""The figures of `lynx bench codec`, on logits and tensors made by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lynx_connector.bench.metrics import Reference, agreeing, kl_divergence, vnmse


def logits_of(*tokens: int, vocabulary: int = 5) -> torch.Tensor:
    """Logits that choose these tokens by far."""
    logits = torch.zeros(len(tokens), vocabulary)
    logits[torch.arange(len(tokens)), list(tokens)] = 10.0
    return logits


def test_agreement_ends_at_the_first_difference():
    reference = Reference.of([0, 1, 2, 3], logits_of(0, 1, 2, 3))
    assert agreeing(reference, logits_of(0, 1, 2, 3)) == 4
    assert agreeing(reference, logits_of(0, 1, 4, 3)) == 2
    assert agreeing(reference, logits_of(1, 1, 2, 3)) == 0


def test_a_tie_of_the_reference_is_no_difference():
    logits = logits_of(0, 1, 2)
    logits[1, 3] = logits[1, 1]
    assert agreeing(Reference.of([0, 1, 2], logits), logits_of(0, 3, 2)) == 3
    # A near tie is one.
    logits[1, 3] -= 1e-3
    assert agreeing(Reference.of([0, 1, 2], logits), logits_of(0, 3, 2)) == 1


def test_where_one_pass_and_decoding_disagree_nothing_is_counted():
    reference = Reference.of([0, 1, 2], logits_of(0, 4, 2))
    assert agreeing(reference, logits_of(0, 4, 2)) == 3


def test_kl_by_hand():
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
    reference = Reference.of([0, 0], torch.stack((p.log(), p.log())))
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert kl_divergence(reference, torch.stack((q.log(), p.log()))) == pytest.approx(expected / 2)


def test_kl_with_a_forbidden_token():
    logits = torch.tensor([[0.0, 1.0, -math.inf]])
    assert kl_divergence(Reference.of([1], logits), logits) == pytest.approx(0, abs=1e-6)


@settings(deadline=None)
@given(seed=st.integers(0, 1000), spread=st.floats(0.01, 5))
def test_kl_is_never_negative_and_ignores_a_shift(seed, spread):
    generator = torch.Generator().manual_seed(seed)
    p, q = torch.randn(2, 3, 7, generator=generator) * spread
    reference = Reference.of([0, 0, 0], p)
    value = kl_divergence(reference, q)
    assert value >= -1e-6
    assert kl_divergence(reference, q + 3.0) == pytest.approx(value, abs=1e-5)
    assert kl_divergence(reference, p) == pytest.approx(0, abs=1e-6)


def test_vnmse_averages_over_layers_not_over_energy():
    truth = torch.ones(4, 2, 2, 1, 8)
    truth[:, 1] = 100.0
    values = truth.clone()
    values[:, 0, 0] = 1.5  # K of layer 0: 0.25
    values[:, 1, 1] = 110.0  # V of layer 1: 0.01
    assert vnmse(values, truth) == pytest.approx((0.125, 0.005))


def test_vnmse_of_a_zero_layer():
    truth = torch.zeros(2, 1, 2, 1, 4)
    assert vnmse(truth.clone(), truth) == (0.0, 0.0)
    assert vnmse(truth + 1, truth) == (math.inf, math.inf)
