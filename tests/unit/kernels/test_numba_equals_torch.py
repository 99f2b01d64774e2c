# SPDX-License-Identifier: Apache-2.0
"""The numba kernels and the torch reference agree bit for bit, on any input bits at all.

Tolerance: none. Both keep one float32 operation order, so even ties fall the same way.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lynx_connector.codec import CODECS, KVGeometry, get_codec
from lynx_connector.codec.types import DTYPES

WITH_KERNELS = [name for name in CODECS if name != "klt"]  # see test_klt.py
SHAPES = [(64, 16, 3), (80, 16, 1), (96, 128, 3), (128, 16, 1), (192, 32, 2), (256, 16, 1)]


def assert_same(codec, cache, slots) -> None:
    out = {t: np.zeros((len(slots), codec.bytes_per_token(t)), np.uint8) for t in codec.tiers}
    values = torch.stack([cache.gather(i, slots) for i in range(cache.num_layers)], dim=1)
    codec.encode(cache, slots, out)
    expected = codec.encode_values(values)
    for tier in codec.tiers:
        np.testing.assert_array_equal(out[tier], expected[tier].numpy(), err_msg=tier.name)
    for count in range(1, len(codec.tiers) + 1):
        rows = [out[tier] for tier in codec.tiers[:count]]
        codec.decode(rows, cache, slots)
        decoded = torch.stack([cache.gather(i, slots) for i in range(cache.num_layers)], dim=1)
        reference = codec.decode_values([torch.from_numpy(r) for r in rows])
        assert torch.equal(decoded.isnan(), reference.isnan())
        assert torch.equal(decoded.nan_to_num(nan=0.0), reference.nan_to_num(nan=0.0))


@pytest.mark.parametrize("name", WITH_KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "block_size", "heads"), SHAPES)
def test_gaussian_caches(make_cache, name, dtype, head_dim, block_size, heads) -> None:
    for layout in ("cpu_vec", "flash_token_major"):
        cache = make_cache(
            layout, heads=heads, head_dim=head_dim, block_size=block_size, dtype=DTYPES[dtype]
        )
        codec = get_codec(name, KVGeometry(2, heads, head_dim, dtype))
        slots = np.random.default_rng(0).permutation(cache.num_slots)[:37]
        assert_same(codec, cache, slots)


@pytest.mark.parametrize("name", WITH_KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_magnitudes_over_the_whole_range(make_cache, name, dtype) -> None:
    """Vectors of every power of two that the dtype has, subnormals included."""
    info = torch.finfo(DTYPES[dtype])
    exponents = torch.arange(np.log2(info.smallest_normal) - 9, np.log2(info.max) + 1, 0.5)
    cache = make_cache("flash", layers=1, heads=1, blocks=40, dtype=DTYPES[dtype])
    slots = np.arange(len(exponents))
    noise = torch.randn(len(slots), 2, 1, 64, dtype=torch.float64)
    values = (noise * 2.0 ** exponents.double()[:, None, None, None]).clamp(-info.max, info.max)
    cache.scatter(0, slots, values.to(DTYPES[dtype]))
    assert_same(get_codec(name, KVGeometry(1, 1, 64, dtype)), cache, slots)


@pytest.mark.parametrize("name", WITH_KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_arbitrary_bits(make_cache, name, dtype, data) -> None:
    """NaN payloads, infinities, subnormals, negative zeros: whatever 16 or 32 bits can say."""
    width = np.uint32 if dtype == "float32" else np.uint16
    cache = make_cache("flash", layers=1, heads=1, head_dim=16, blocks=1, dtype=DTYPES[dtype])
    storage = cache.bits(0)
    storage[:] = data.draw(hnp.arrays(width, storage.shape))
    tokens = data.draw(st.integers(1, 16))
    assert_same(get_codec(name, KVGeometry(1, 1, 16, dtype)), cache, np.arange(tokens))
