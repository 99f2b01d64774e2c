# SPDX-License-Identifier: Apache-2.0
"""Raw vectors: records and back, and refusal of what does not fit the frame."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lynx_connector.errors import TransferError
from lynx_connector.tiers.raw_vectors import RawVectors, record_bytes

WIDTH, VECTORS, TOKENS, FIRST = 8, 12, 20, 100

places = st.sets(st.tuples(st.integers(0, TOKENS - 1), st.integers(0, VECTORS - 1)), min_size=1)


def raw_at(keys):
    keys = sorted(keys)
    data = np.random.default_rng(0).integers(0, 255, (len(keys), WIDTH), np.uint8)
    tokens = np.array([token + FIRST for token, _ in keys], np.int64)
    return RawVectors(tokens, np.array([vector for _, vector in keys], np.int64), data)


def unpack(packed, num_tokens=TOKENS, num_vectors=VECTORS):
    return RawVectors.unpack(packed, WIDTH, FIRST, num_tokens, num_vectors)


def same(one, other):
    return all(
        np.array_equal(getattr(one, name), getattr(other, name))
        for name in ("tokens", "vectors", "data")
    )


@given(places)
def test_round_trip(keys):
    raw = raw_at(keys)
    packed = raw.pack(FIRST)
    assert packed.nbytes == raw.num_bytes == len(raw) * record_bytes(WIDTH)
    assert same(unpack(packed), raw)


@given(places, st.lists(st.integers(0, TOKENS), max_size=5))
def test_cut_at_any_tokens_and_joined_they_are_the_same(keys, cuts):
    raw = raw_at(keys)
    edges = [FIRST, *sorted(FIRST + cut for cut in cuts), FIRST + TOKENS]
    parts = [raw.of(a, b) for a, b in pairwise(edges)]
    assert same(RawVectors.join([part for part in parts if len(part)]), raw)


@given(st.binary(max_size=20 * record_bytes(WIDTH)))
def test_noise_is_refused_or_fits(noise):
    whole = len(noise) // record_bytes(WIDTH) * record_bytes(WIDTH)
    packed = np.frombuffer(noise[:whole], np.uint8)
    try:
        raw = unpack(packed)
    except TransferError:
        return
    assert not len(raw) or (raw.tokens.max() < FIRST + TOKENS and raw.vectors.max() < VECTORS)


@pytest.mark.parametrize("limits", [{"num_tokens": 3}, {"num_vectors": 2}])
def test_out_of_range_is_refused(limits):
    with pytest.raises(TransferError, match="malformed exceptions"):
        unpack(raw_at({(0, 0), (3, 2)}).pack(FIRST), **limits)


@pytest.mark.parametrize("order", [[1, 0], [0, 0]])
def test_order_and_repetition_are_refused(order):
    packed = raw_at({(0, 0), (3, 2)}).pack(FIRST).reshape(2, -1)[order].reshape(-1)
    with pytest.raises(TransferError, match="ascending"):
        unpack(packed)
