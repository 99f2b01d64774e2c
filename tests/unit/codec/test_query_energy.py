# SPDX-License-Identifier: Apache-2.0
"""Tables that know the queries spend their bits where queries look."""

import numpy as np
import pytest
import torch
from lynx_kernels.shared.paged import PagedKVCache, PageIndex
from lynx_kernels.shared.rotation import NO_ROTATION, Rotation

from lynx_connector.codec import KltCodec, KVGeometry, Tier
from lynx_connector.codec.klt_learner import TableLearner
from lynx_connector.codec.query_energy import QueryEnergy

D = 64
GEOMETRY = KVGeometry(1, 2, D, "float32")
TOKENS = 1024


def paged(values):
    return PagedKVCache({"l": values}, 16, 2, D, PageIndex.rows(16, D, 2 * D))


def zeros():
    return paged(torch.zeros(TOKENS // 16, 2, 16, 2 * D))


def cache():
    generator = torch.Generator().manual_seed(5)
    mix = torch.randn(2 * D, 2 * D, generator=generator) / 8
    return paged(torch.randn((TOKENS // 16, 2, 16, 2 * D), generator=generator) @ mix)


def queries(tokens=2000):
    """Four query heads that look at the first eight elements, two for each KV head."""
    generator = torch.Generator().manual_seed(6)
    energy = torch.where(torch.arange(D) < 8, 1.0, 0.02)
    return torch.randn((tokens, 1, 4, D), generator=generator) * energy


def score_error(tables, source):
    codec = KltCodec(GEOMETRY, tables, 4)
    slots = np.arange(TOKENS)
    rows = {tier: np.empty((TOKENS, codec.bytes_per_token(tier)), np.uint8) for tier in codec.tiers}
    codec.encode(source, slots, rows, 0)
    target = zeros()
    codec.decode([rows[Tier.ANCHOR]], target, slots, 0)
    error = (target.gather(0, slots) - source.gather(0, slots))[:, 0, 0]
    return float((queries(300)[:, 0, 0] @ error.T).square().mean())


def learner(source):
    one = TableLearner(GEOMETRY)
    one.observe(source, np.arange(TOKENS), 0)
    return one


def test_scores_are_better_than_with_tables_that_know_only_keys():
    source = cache()
    plain = learner(source)
    weighted = learner(source)
    weighted.observe_queries(queries())
    assert score_error(weighted.build(), source) < 0.5 * score_error(plain.build(), source)


def test_without_queries_the_weight_is_the_identity():
    assert (QueryEnergy(GEOMETRY, NO_ROTATION).weight() == np.eye(D)).all()


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_weights_stay_invertible(scale):
    energy = QueryEnergy(GEOMETRY, NO_ROTATION)
    energy.observe(queries() * scale)
    weight = energy.weight()
    assert np.isfinite(weight).all()
    assert np.linalg.cond(weight).max() < 100


def test_queries_that_are_not_finite_teach_nothing():
    one, other = (QueryEnergy(GEOMETRY, NO_ROTATION) for _ in range(2))
    seen = queries(100)
    one.observe(torch.cat((seen, torch.full_like(seen, float("nan")))))
    other.observe(torch.cat((seen, torch.zeros_like(seen))))
    np.testing.assert_array_equal(one.weight(), other.weight())


def test_a_fast_pair_of_elements_is_seen_from_all_sides():
    """Averaged over distances, the elements of a pair that turns quickly count alike."""
    rotation = Rotation(tuple(1 << 29 for _ in range(D // 2)), is_neox=True)
    energy = QueryEnergy(GEOMETRY, rotation)
    seen = torch.zeros(100, 1, 4, D)
    seen[..., 0] = torch.randn(100, 1, 4, generator=torch.Generator().manual_seed(1))
    energy.observe(seen)
    diagonal = np.diagonal(energy.weight()[0, 0])
    assert diagonal[0] == pytest.approx(diagonal[D // 2], rel=0.3)
    assert diagonal[0] > 2 * diagonal[1]
