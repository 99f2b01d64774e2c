# SPDX-License-Identifier: Apache-2.0
"""What holds for every registered codec. A new codec states its bounds below and is tested."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from lynx_kernels.shared.paged import PagedKVCache, PageIndex
from lynx_kernels.shared.rotation import Rotation

from lynx_connector.codec import CODECS, Codec, CodecError, KltTables, KVGeometry, Tier, get_codec
from lynx_connector.codec.klt_learner import TableLearner
from lynx_connector.codec.types import DTYPES

# Mean squared error over mean square on Gaussian vectors, by number of tiers decoded.
VNMSE_BOUND = {
    "klt": [1.2e-2, 8e-5],  # K of white noise: nothing to gather, and half a bit less than V
    "hadamard": [9e-3, 4.5e-5],
    "bf16": [0.0],
    "int8": [6e-5],
    "int4": [2e-2],
}
# Rounding to the cache's dtype comes on top.
DTYPE_VNMSE = {"bfloat16": 1e-5, "float16": 1e-6, "float32": 1e-9}

ODD_SHAPES = [
    # tokens, heads, head_dim, block_size, dtype
    (1, 1, 64, 16, "bfloat16"),
    (17, 3, 64, 128, "bfloat16"),
    (17, 1, 80, 16, "float16"),
    (33, 3, 96, 128, "float32"),
    (16, 3, 128, 16, "bfloat16"),
    (200, 1, 128, 128, "float16"),
]


@pytest.fixture(params=CODECS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def codec_for(name: str, cache) -> Codec:
    dtype = str(cache.dtype).removeprefix("torch.")
    geometry = KVGeometry(cache.num_layers, cache.num_kv_heads, cache.head_dim, dtype)
    return get_codec(name, geometry, tables=learned(geometry) if name == "klt" else None)


@functools.cache
def learned(geometry: KVGeometry) -> KltTables:
    """Tables from Gaussian values, which is what `make_cache` holds."""
    g = geometry
    page = PageIndex.rows(2048, g.head_dim, 2 * g.head_dim)
    noise = torch.Generator().manual_seed(7)
    shape = (1, g.num_kv_heads, 2048, 2 * g.head_dim)
    layers = {
        str(layer): torch.randn(shape, generator=noise).to(DTYPES[g.dtype])
        for layer in range(g.num_layers)
    }
    cache = PagedKVCache(layers, 2048, g.num_kv_heads, g.head_dim, page)
    steps = range(1 << 30, 1 << 20, -(1 << 30) // (geometry.head_dim // 4))
    learner = TableLearner(geometry, Rotation(tuple(steps), is_neox=True))
    learner.observe(cache, np.arange(2048), 0)
    return learner.build()


def empty_rows(codec: Codec, tokens: int) -> dict[Tier, np.ndarray]:
    return {t: np.zeros((tokens, codec.bytes_per_token(t)), np.uint8) for t in codec.tiers}


def encoded(codec: Codec, cache, slots, first_position: int = 0) -> dict[Tier, np.ndarray]:
    out = empty_rows(codec, len(slots))
    codec.encode(cache, slots, out, first_position)
    return out


def all_values(cache, slots) -> torch.Tensor:
    return torch.stack([cache.gather(i, slots) for i in range(cache.num_layers)], dim=1)


def vnmse(y: torch.Tensor, x: torch.Tensor) -> float:
    return float((y.double() - x.double()).square().sum() / x.double().square().sum())


@pytest.mark.parametrize(("tokens", "heads", "head_dim", "block_size", "dtype"), ODD_SHAPES)
def test_round_trip_error_is_bounded(
    make_cache, name, layout, tokens, heads, head_dim, block_size, dtype
) -> None:
    cache = make_cache(
        layout, heads=heads, head_dim=head_dim, block_size=block_size, blocks=256 // block_size + 1,
        dtype=DTYPES[dtype],
    )  # fmt: skip
    codec = codec_for(name, cache)
    slots = np.random.default_rng(1).permutation(cache.num_slots)[:tokens]
    before = all_values(cache, slots)
    rows = list(encoded(codec, cache, slots).values())
    assert len(VNMSE_BOUND[name]) == len(codec.tiers)
    for count, bound in enumerate(VNMSE_BOUND[name], start=1):
        codec.decode(rows[:count], cache, slots)
        allowed = bound + DTYPE_VNMSE[dtype] * (bound > 0)
        # One token is few vectors: individual ones scatter around the mean.
        allowed *= 1 if tokens > 1 else 1.6
        assert vnmse(all_values(cache, slots), before) <= allowed


def test_rows_of_a_slice_are_the_slice_of_rows(make_cache, name, layout) -> None:
    cache = make_cache(layout)
    codec = codec_for(name, cache)
    slots = np.random.default_rng(2).permutation(cache.num_slots)
    whole = encoded(codec, cache, slots)
    for start, stop in [(0, 1), (1, 18), (18, 64), (63, 64), (5, 5)]:
        part = encoded(codec, cache, slots[start:stop], start)
        for tier in codec.tiers:
            np.testing.assert_array_equal(part[tier], whole[tier][start:stop])


def test_decode_writes_only_the_given_slots(make_cache, name, layout) -> None:
    cache = make_cache(layout)
    codec = codec_for(name, cache)
    slots = np.array([1, 2, 40, 17, 63])
    rows = list(encoded(codec, cache, slots).values())
    untouched = np.setdiff1d(np.arange(cache.num_slots), slots)
    before = all_values(cache, untouched)
    for count in range(1, len(rows) + 1):
        codec.decode(rows[:count], cache, slots)
        assert torch.equal(all_values(cache, untouched), before)


def test_a_slice_of_a_frame_can_be_decoded_alone(make_cache, name) -> None:
    cache = make_cache("cpu_vec", block_size=32)
    codec = codec_for(name, cache)
    slots = np.arange(40)
    rows = list(encoded(codec, cache, slots).values())
    whole = make_cache("cpu_vec", block_size=32, seed=9)
    codec.decode(rows, whole, slots)
    parts = make_cache("cpu_vec", block_size=32, seed=9)
    for part in (slice(30, 40), slice(0, 13), slice(13, 30)):
        codec.decode([r[part] for r in rows], parts, slots[part], part.start)
    assert torch.equal(all_values(parts, slots), all_values(whole, slots))


def test_layouts_and_block_sizes_may_differ_between_the_two_sides(make_cache, name) -> None:
    producer = make_cache("cpu_vec", block_size=128, blocks=2)
    consumer = make_cache("flash_token_major", block_size=16, blocks=8, seed=5)
    codec = codec_for(name, producer)
    source, target = np.arange(100, 177), np.random.default_rng(3).permutation(128)[:77]
    rows = list(encoded(codec, producer, source).values())
    codec.decode(rows, consumer, target)
    codec.decode(rows, producer, source)
    assert torch.equal(all_values(consumer, target), all_values(producer, source))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_not_finite_values_stay_in_their_vector(make_cache, name, poison, dtype) -> None:
    """The vector itself decodes to NaN ("bf16" keeps it as it is); every other as without it."""
    clean = make_cache("flash", dtype=DTYPES[dtype])
    poisoned = make_cache("flash", dtype=DTYPES[dtype])
    codec = codec_for(name, clean)
    slots = np.arange(20)
    values = poisoned.gather(0, slots)
    values[7, 1, 2, 5] = poison
    poisoned.scatter(0, slots, values)
    for cache in (clean, poisoned):
        codec.decode(list(encoded(codec, cache, slots).values()), cache, slots)
    actual, expected = all_values(poisoned, slots), all_values(clean, slots)
    vector = actual[7, 0, 1, 2].clone()
    if name == "bf16":
        assert torch.equal(vector.nan_to_num(), values[7, 1, 2].nan_to_num())
    else:
        assert vector.isnan().all()
    actual[7, 0, 1, 2] = expected[7, 0, 1, 2]
    assert torch.equal(actual, expected)


def test_zero_vectors_decode_to_zero(make_cache, name) -> None:
    cache = make_cache("flash")
    codec = codec_for(name, cache)
    slots = np.arange(16)
    values = cache.gather(1, slots)
    values[3, 0, 1] = 0
    cache.scatter(1, slots, values)
    rows = list(encoded(codec, cache, slots).values())
    for count in range(1, len(rows) + 1):
        codec.decode(rows[:count], cache, slots)
        # klt subtracts a mean, so zero is a vector like any other.
        assert cache.gather(1, slots)[3, 0, 1].abs().max() <= (0.05 if name == "klt" else 0)


def test_read_only_and_unaligned_rows_are_decoded(make_cache, name) -> None:
    """Frames are slices of received bytes: read-only, at any address."""
    cache = make_cache("flash")
    codec = codec_for(name, cache)
    slots = np.arange(8)
    frames = []
    for rows in encoded(codec, cache, slots).values():
        data = b"x" + rows.tobytes()
        frames.append(np.frombuffer(data, np.uint8, offset=1).reshape(rows.shape))
    expected = make_cache("flash", seed=1)
    codec.decode([frame.copy() for frame in frames], expected, slots)
    actual = make_cache("flash", seed=1)
    codec.decode(frames, actual, slots)
    assert torch.equal(all_values(actual, slots), all_values(expected, slots))


def test_rows_can_be_encoded_into_any_address(make_cache, name) -> None:
    cache = make_cache("flash")
    codec = codec_for(name, cache)
    slots = np.arange(5)
    expected = encoded(codec, cache, slots)
    shifted = {
        t: np.zeros(rows.size + 1, np.uint8)[1:].reshape(rows.shape) for t, rows in expected.items()
    }
    codec.encode(cache, slots, shifted)
    for tier in codec.tiers:
        np.testing.assert_array_equal(shifted[tier], expected[tier])


def test_no_tokens_is_no_work(make_cache, name) -> None:
    cache = make_cache("flash")
    codec = codec_for(name, cache)
    slots = np.zeros(0, np.int64)
    codec.decode(list(encoded(codec, cache, slots).values()), cache, slots)


def test_warmup_runs(name) -> None:
    geometry = KVGeometry(2, 3, 64, "bfloat16")
    get_codec(name, geometry, tables=learned(geometry) if name == "klt" else None).warmup()


def test_wrong_rows_and_caches_are_refused(make_cache, name) -> None:
    cache = make_cache("flash")
    codec = codec_for(name, cache)
    slots = np.arange(4)
    rows = list(encoded(codec, cache, slots).values())
    other = make_cache("flash", heads=1)
    with pytest.raises(CodecError, match="expected"):
        codec.decode(rows, other, slots)
    with pytest.raises(CodecError, match="C-contiguous"):
        codec.decode([rows[0][:, ::-1], *rows[1:]], cache, slots)
    with pytest.raises(CodecError, match="uint8"):
        codec.decode([rows[0][:3], *rows[1:]], cache, slots)
    with pytest.raises(CodecError, match="tiers"):
        codec.decode([*rows, rows[0]], cache, slots)
    with pytest.raises(CodecError, match="tiers"):
        codec.decode([], cache, slots)
    with pytest.raises(ValueError, match="slots"):
        codec.decode(rows, cache, slots + 1000)
    with pytest.raises(CodecError, match="tiers"):
        codec.encode(cache, slots, {})
    with pytest.raises(CodecError, match="no exact tier"):
        codec.bytes_per_token(Tier.EXACT)


@pytest.mark.parametrize("name", ["hadamard", "klt"])
def test_the_expected_error_is_the_error(make_cache, name):
    """Over many vectors its root mean square is within 1/8 octave of what the codec says."""
    cache = make_cache("flash", dtype=DTYPES["float32"], blocks=16)
    codec = codec_for(name, cache)
    slots = np.arange(200)
    rows = encoded(codec, cache, slots)
    g = codec.geometry
    before = np.stack([cache.gather(i, slots).numpy() for i in range(g.num_layers)], axis=1)
    codec.decode(list(rows.values()), cache, slots)
    after = np.stack([cache.gather(i, slots).numpy() for i in range(g.num_layers)], axis=1)
    spread = codec.error_spread(rows[Tier.ANCHOR]).reshape(200, g.num_layers, 2, g.num_kv_heads, 1)
    relative = (after - before) / np.exp2((spread + codec.error_tilt) / 8)
    for kv in range(2):
        assert abs(8 * np.log2(np.sqrt((relative[:, :, kv] ** 2).mean()))) < 1.5
