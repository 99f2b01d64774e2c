# SPDX-License-Identifier: Apache-2.0
"""Codec klt: numba equals the torch reference, and rotations are read off a model's own table.

Reconstructions are equal bit for bit for any rows at all; the encoder's codes may differ by one
where a sum was rounded otherwise, which is allowed for one byte in a thousand.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lynx_kernels.klt import reference as klt
from lynx_kernels.shared.rotation import NO_ROTATION, Rotation, fit_rotation

from lynx_connector.codec import KVGeometry, Tier, get_codec
from lynx_connector.codec.klt_learner import TableLearner
from lynx_connector.codec.types import DTYPES

SHAPES = [(64, 16, 3), (80, 16, 1), (96, 128, 3), (128, 16, 1), (192, 32, 2), (256, 16, 1)]
BITS = [3, 4, 5]


def rotation_of(head_dim: int, kind: str) -> Rotation:
    """kind: "neox" or "gptj", over half of the elements, or "none"."""
    steps = [int(2**32 / (2 * math.pi) / 10 ** (i / 4)) for i in range(head_dim // 4)]
    return NO_ROTATION if kind == "none" else Rotation(tuple(steps), kind == "neox")


def tables_for(cache, dtype: str, rotation: Rotation):
    geometry = KVGeometry(cache.num_layers, cache.num_kv_heads, cache.head_dim, dtype)
    learner = TableLearner(geometry, rotation)
    learner.observe(cache, np.arange(cache.num_slots), 0)
    return geometry, learner.build()


def read(cache, slots: np.ndarray) -> torch.Tensor:
    return torch.stack([cache.gather(i, slots) for i in range(cache.num_layers)], dim=1)


def assert_decoded_alike(codec, cache, slots, rows, first) -> None:
    for count in (1, 2):
        codec.decode(rows[:count], cache, slots, first)
        reference = codec.decode_values([torch.from_numpy(r) for r in rows[:count]], first)
        decoded = read(cache, slots)
        assert torch.equal(decoded.isnan(), reference.isnan())
        assert torch.equal(decoded.nan_to_num(nan=0.0), reference.nan_to_num(nan=0.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "block_size", "heads"), SHAPES)
def test_learned_tables(make_cache, dtype, head_dim, block_size, heads) -> None:
    for layout, kind in (("cpu_vec", "neox"), ("flash_token_major", "gptj")):
        cache = make_cache(
            layout, heads=heads, head_dim=head_dim, block_size=block_size, dtype=DTYPES[dtype]
        )
        geometry, tables = tables_for(cache, dtype, rotation_of(head_dim, kind))
        slots = np.random.default_rng(0).permutation(cache.num_slots)[:37]
        values = read(cache, slots)
        for bits in BITS:
            codec = get_codec("klt", geometry, tables=tables, anchor_bits=bits)
            rows = {t: np.zeros((37, codec.bytes_per_token(t)), np.uint8) for t in codec.tiers}
            cache.scatter(0, slots, values[:, 0])
            cache.scatter(1, slots, values[:, 1])
            codec.encode(cache, slots, rows, 1000)
            for tier, expected in codec.encode_values(values, 1000).items():
                assert (rows[tier] != expected.numpy()).mean() < 1e-3
            assert_decoded_alike(codec, cache, slots, list(rows.values()), 1000)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    dtype=st.sampled_from(list(DTYPES)),
    bits=st.sampled_from(BITS),
    kind=st.sampled_from(["neox", "gptj", "none"]),
    tokens=st.integers(1, 33),
)
def test_any_rows_decode_alike(make_cache, seed, dtype, bits, kind, tokens) -> None:
    cache = make_cache("flash", layers=1, heads=2, head_dim=32, blocks=3, dtype=DTYPES[dtype])
    geometry, tables = tables_for(cache, dtype, rotation_of(32, kind))
    codec = get_codec("klt", geometry, tables=tables, anchor_bits=bits)
    noise = np.random.default_rng(seed)
    rows = [
        noise.integers(0, 256, (tokens, codec.bytes_per_token(t)), np.uint8) for t in codec.tiers
    ]
    assert_decoded_alike(codec, cache, np.arange(tokens), rows, seed % 5000)


def test_a_vector_that_is_not_finite_leaves_the_others_alone(make_cache) -> None:
    cache = make_cache("flash", layers=1, heads=2, head_dim=32, blocks=2)
    geometry, tables = tables_for(cache, "bfloat16", rotation_of(32, "neox"))
    codec = get_codec("klt", geometry, tables=tables)
    slots = np.arange(20)

    def rows():
        out = {t: np.zeros((20, codec.bytes_per_token(t)), np.uint8) for t in codec.tiers}
        codec.encode(cache, slots, out, 0)
        return out

    before = rows()
    values = read(cache, slots)[:, 0]
    values[7, 0, 1, 3] = torch.inf
    values[9, 1, 0, 5] = torch.nan
    cache.scatter(0, slots, values)
    after = rows()
    tokens, vectors = codec.exceptions(after[Tier.ANCHOR])
    assert list(zip(tokens.tolist(), vectors.tolist(), strict=True)) == [(7, 1), (9, 2)]
    untouched = [t for t in range(20) if t not in (7, 9)]
    for tier in codec.tiers:
        np.testing.assert_array_equal(before[tier][untouched], after[tier][untouched])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("factor", [1.0, 1.2])
def test_a_rotation_is_read_off_its_table(dtype, factor) -> None:
    """Plain frequencies, scaled ones, and YaRN's factor on cos and sin."""
    frequency = 1 / 500000 ** (torch.arange(0, 64, 2) / 64)
    frequency[16:] /= 8
    angles = torch.outer(torch.arange(8192.0), frequency)
    table = factor * torch.cat((angles.cos(), angles.sin()), dim=1).to(DTYPES[dtype])
    found = fit_rotation(table, True)
    assert found is not None
    steps = np.array(found.steps) * (2 * math.pi / 2**32)
    assert np.abs(steps - frequency.numpy()).max() * 8192 < 0.02


def test_angles_that_do_not_grow_evenly_are_no_rotation() -> None:
    frequency = 1 / 10000 ** (torch.arange(0, 32, 2) / 32)
    positions = torch.arange(4096.0)
    long = torch.where(positions < 2048, 1.0, 0.25) * positions
    angles = torch.outer(long, frequency)
    assert fit_rotation(torch.cat((angles.cos(), angles.sin()), dim=1), True) is None
    assert fit_rotation(torch.ones(3, 4096, 32), True) is None


@pytest.mark.parametrize("wrong", [0, 5, 24_570])
def test_one_wrong_position_among_many_is_no_rotation(wrong) -> None:
    """A table of 24,573 positions is checked at every fifth."""
    angles = torch.outer(torch.arange(24_573.0), torch.tensor([0.25, 0.01]))
    assert fit_rotation(torch.cat((angles.cos(), angles.sin()), dim=1), True) is not None
    angles[wrong, 1] += 0.1
    assert fit_rotation(torch.cat((angles.cos(), angles.sin()), dim=1), True) is None


def test_turning_back_undoes_a_turn() -> None:
    x = torch.randn(50, 2, 3, 64)
    for kind in ("neox", "gptj"):
        rotation = rotation_of(64, kind)
        turned = rotation.turn(x, 77)
        assert not torch.allclose(turned, x, atol=0.1)
        assert torch.allclose(rotation.turn(turned, 77, back=True), x, atol=1e-3)


def test_v_spends_more_bits_than_k() -> None:
    assert klt.vector_bytes(64, 4) == (32, 28, 36)
    assert klt.vector_bytes(80, 5) == (50, 25, 35)
