# SPDX-License-Identifier: Apache-2.0
"""The exact tier behind a codec: identity on any bits, runs cut anywhere, bad bytes refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lynx_kernels.exact import cpu as exact_cpu
from lynx_kernels.shared.error_steps import NO_ERROR

from lynx_connector.codec import CodecError, KVGeometry, Tier, get_codec
from lynx_connector.codec.exact import ExactTier
from lynx_connector.codec.types import DTYPES

SLOTS = np.arange(16)


def caches(make_cache, dtype):
    """True values and, apart, room for their reconstruction."""
    return [
        make_cache("flash", layers=2, heads=2, head_dim=16, blocks=1, dtype=DTYPES[dtype])
        for _ in range(2)
    ]


def refined(codec, true, other, first=0):
    """Rows of the anchor; the reconstruction is in `other`."""
    out = {t: np.zeros((len(SLOTS), codec.bytes_per_token(t)), np.uint8) for t in codec.tiers}
    codec.encode(true, SLOTS, out, first)
    codec.decode(list(out.values()), other, SLOTS, first)
    return out[Tier.ANCHOR]


def same_bits(one, other):
    return all(np.array_equal(one.bits(i), other.bits(i)) for i in range(one.num_layers))


@pytest.mark.parametrize("dtype", DTYPES)
def test_warmup_compiles_both_ways_and_leaves_the_cache_alone(make_cache, dtype):
    cache, before = caches(make_cache, dtype)
    for layer in range(2):
        before.bits(layer)[:] = cache.bits(layer)[:] = layer + 1
    exact_cpu._encoder.cache_clear()
    exact_cpu._decoder.cache_clear()
    ExactTier(get_codec("hadamard", KVGeometry(2, 2, 16, dtype))).warmup(cache)
    assert exact_cpu._encoder.cache_info().currsize == 1
    assert exact_cpu._decoder.cache_info().currsize == 1
    assert same_bits(cache, before)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), octaves=st.sampled_from([None, -60, -14, 0, 14]))
def test_identity_on_any_bits(make_cache, dtype, seed, octaves):
    """Random bits (NaN, infinity, subnormals), and values of one magnitude with both zeros."""
    true, other = caches(make_cache, dtype)
    rng = np.random.default_rng(seed)
    for layer in range(2):
        storage = true.bits(layer)
        if octaves is None:
            storage[:] = rng.integers(0, 1 << 8 * storage.itemsize, storage.shape)
        else:
            values = rng.standard_normal(storage.shape).astype(np.float32) * 2.0**octaves
            values[rng.integers(0, values.size, 9)] = -0.0
            single = values.astype(np.float32).view(np.uint32)
            half = np.clip(values, -65504, 65504).astype(np.float16).view(np.uint16)
            storage[:] = {"float32": single, "bfloat16": single >> 16, "float16": half}[dtype]
    codec = get_codec("hadamard", KVGeometry(2, 2, 16, dtype))
    anchor = refined(codec, true, other)
    tier = ExactTier(codec)
    data, lengths = tier.encode(true, SLOTS, other, SLOTS, anchor)
    tier.decode(data, lengths, other, SLOTS, anchor)
    assert same_bits(true, other)


def test_runs_are_cut_anywhere(make_cache):
    true, other = caches(make_cache, "bfloat16")
    codec = get_codec("hadamard", KVGeometry(2, 2, 16, "bfloat16"))
    anchor = refined(codec, true, other)
    tier = ExactTier(codec)
    data, lengths = tier.encode(true, SLOTS, other, SLOTS, anchor)
    ends = np.cumsum(lengths)
    for start, stop in [(0, 5), (5, 5), (5, 6), (6, 16)]:
        begin = ends[start - 1] if start else 0
        end = ends[stop - 1] if stop else 0
        part = slice(start, stop)
        tier.decode(data[begin:end], lengths[part], other, SLOTS[part], anchor[part])
    assert same_bits(true, other)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_bad_bytes_are_refused_and_write_nothing(make_cache, data):
    true, other = caches(make_cache, "bfloat16")
    codec = get_codec("hadamard", KVGeometry(2, 2, 16, "bfloat16"))
    anchor = refined(codec, true, other)
    tier = ExactTier(codec)
    stream, lengths = tier.encode(true, SLOTS, other, SLOTS, anchor)
    before = [other.bits(i).copy() for i in range(2)]
    kind = data.draw(st.sampled_from(["flip", "cut", "lengths", "noise"]))
    if kind == "flip":
        stream[data.draw(st.integers(0, len(stream) - 1))] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        missing = data.draw(st.integers(1, int(lengths[-1])))
        stream, lengths[-1] = stream[: len(stream) - missing], lengths[-1] - missing
    elif kind == "lengths":
        token = data.draw(st.integers(1, 15))
        shift = data.draw(st.integers(1, int(lengths[token])))
        lengths[0] += shift
        lengths[token] -= shift
    else:
        stream = np.frombuffer(data.draw(st.binary(min_size=1, max_size=400)), np.uint8)
        lengths = np.zeros(16, np.uint32)
        lengths[3] = len(stream)
    with pytest.raises(CodecError, match="exact tier"):
        tier.decode(stream, lengths, other, SLOTS, anchor)
    assert all(np.array_equal(other.bits(i), before[i]) for i in range(2))


def test_zero_vectors_cost_next_to_nothing(make_cache):
    true, other = caches(make_cache, "bfloat16")
    for layer in range(2):
        true.bits(layer)[:] = 0
    codec = get_codec("hadamard", KVGeometry(2, 2, 16, "bfloat16"))
    anchor = refined(codec, true, other)
    assert (codec.error_spread(anchor) <= NO_ERROR).all()
    _, lengths = ExactTier(codec).encode(true, SLOTS, other, SLOTS, anchor)
    assert lengths.max() <= 8 + 4 + 2
