# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels against the torch reference, bit for bit.

The interpreter needs a process of its own: `run_triton_cases.py`. Where there is a CUDA device the
same cases run in the test process.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import torch
from lynx_kernels.shared.paged import PagedKVCache
from lynx_kernels.shared.rotation import Rotation

from lynx_connector.codec import Codec, KltTables, KVGeometry, get_codec
from lynx_connector.codec import device as device_path
from lynx_connector.codec.klt_learner import TableLearner
from lynx_connector.codec.types import DTYPES
from tests.unit.conftest import build_cache

CODECS = ("klt", "hadamard", "bf16", "int8", "int4")
# head_dim, block size, heads, layout; the layouts are those of build_cache.
SHAPES = (
    (64, 16, 3, "flash_token_major"),
    (64, 7, 3, "cpu_vec"),
    (80, 16, 1, "layers_interleaved"),
    (96, 12, 3, "flash"),
    (128, 16, 2, "flash_token_major"),
    (128, 128, 1, "cpu_vec"),
    (192, 1, 2, "flash"),
    (256, 32, 1, "flash"),
)


def on(cache: PagedKVCache, device: str) -> PagedKVCache:
    """The same cache on another device; strides are kept."""
    if device == "cpu":
        return cache
    moved = {}
    for name, flat in zip(cache.layer_names, cache._flat, strict=True):
        there = flat.to(device)
        page = cache.index.extent // cache.block_size
        shape = (cache.num_blocks, cache.num_kv_heads, cache.block_size, page)
        moved[name] = there.as_strided(shape, (cache.stride_block, cache.stride_head, page, 1))
    return PagedKVCache(moved, cache.block_size, cache.num_kv_heads, cache.head_dim, cache.index)


def codec_of(name: str, cache: PagedKVCache) -> Codec:
    dtype = str(cache.dtype).removeprefix("torch.")
    geometry = KVGeometry(cache.num_layers, cache.num_kv_heads, cache.head_dim, dtype)
    return get_codec(name, geometry, tables=learned(geometry) if name == "klt" else None)


@functools.cache
def learned(geometry: KVGeometry) -> KltTables:
    """Tables from noise, with a rotation of half of the elements."""
    shape = {"heads": geometry.num_kv_heads, "head_dim": geometry.head_dim, "blocks": 20}
    cache = build_cache(layers=geometry.num_layers, dtype=DTYPES[geometry.dtype], **shape)
    learner = TableLearner(geometry)
    learner.observe(cache, np.arange(cache.num_slots), 0)
    steps = np.random.default_rng(1).integers(0, 2**32, geometry.head_dim // 4)
    rotation = Rotation(tuple(steps.tolist()), is_neox=geometry.head_dim % 32 == 0)
    return dataclasses.replace(learner.build(), rotation=rotation)


def everything(cache: PagedKVCache) -> torch.Tensor:
    slots = np.arange(cache.num_slots)
    return torch.stack([cache.gather(i, slots) for i in range(cache.num_layers)], dim=1).cpu()


def bits(values: torch.Tensor) -> torch.Tensor:
    """Bit patterns, every NaN alike."""
    integers = values.view(torch.int32 if values.dtype == torch.float32 else torch.int16)
    return integers.masked_fill(values.isnan(), 0x7FC0)


def check(codec: Codec, make: Callable[[int], PagedKVCache], slots: np.ndarray) -> None:
    """Rows, and what decoding them leaves in the whole cache, equal the reference's.

    make: a cache with a seed's content on the device under test.
    """
    cache = make(0)
    values = torch.stack([cache.gather(i, slots) for i in range(cache.num_layers)], dim=1).cpu()
    out = {t: np.zeros((len(slots), codec.bytes_per_token(t)), np.uint8) for t in codec.tiers}
    device_path.encode(codec, cache, slots, out, 3)
    expected = codec.encode_values(values, 3)
    for tier in codec.tiers:
        differ = (out[tier] != expected[tier].numpy()).mean()
        # klt's encoder may round a sum otherwise; what is made of its codes may not differ.
        assert differ <= (0.01 if codec.name == "klt" else 0), f"{tier.name}: {differ:.2%} differ"
    for count in range(1, len(codec.tiers) + 1):
        rows = [out[tier] for tier in codec.tiers[:count]]
        cache = make(1)
        wanted = everything(cache)
        wanted[slots] = codec.decode_values([torch.from_numpy(r) for r in rows], 3)
        device_path.decode(codec, rows, cache, slots, 3)
        assert torch.equal(bits(everything(cache)), bits(wanted)), f"decoded from {count} tiers"


def shapes(codec: str, dtype: str, device: str) -> None:
    """Every head size, layout and odd block size; permuted slots, a tail, poisoned vectors."""
    # klt takes long to interpret: it goes through all shapes once, not once for every dtype.
    step, first = (3, list(DTYPES).index(dtype)) if codec == "klt" else (1, 0)
    for head_dim, block_size, heads, layout in SHAPES[first::step]:

        def make(
            seed: int, d: int = head_dim, n: int = block_size, h: int = heads, form: str = layout
        ) -> PagedKVCache:
            cache = build_cache(
                form,
                heads=h,
                head_dim=d,
                block_size=n,
                blocks=-(-24 // n),
                dtype=DTYPES[dtype],
                seed=seed,
            )
            return on(poisoned(cache), device)

        try:
            cache = make(0)
            slots = np.random.default_rng(0).permutation(cache.num_slots)[:21]
            check(codec_of(codec, cache), make, slots)
        except AssertionError as error:
            raise AssertionError(f"{head_dim} {block_size} {heads} {layout}: {error}") from error


def poisoned(cache: PagedKVCache) -> PagedKVCache:
    """NaN, infinities, zeros, denormals and the largest values in one vector each."""
    everywhere = np.arange(cache.num_slots)
    values = cache.gather(0, everywhere)
    values[2, 0, 0, 5], values[3, 1, 0, 1], values[4, 0, 0, 7] = (
        float("nan"),
        float("inf"),
        float("-inf"),
    )
    values[5, 1, 0] = 0
    values[6, 0, 0] = -0.0
    info = torch.finfo(cache.dtype)
    values[7, 0, 0] *= info.smallest_normal
    values[8, 1, 0] = values[8, 1, 0].sign() * info.max
    cache.scatter(0, everywhere, values)
    return cache


def magnitudes(codec: str, dtype: str, device: str) -> None:
    """Vectors of every power of two that the dtype has, and arbitrary bits."""
    info = torch.finfo(DTYPES[dtype])
    low, high = np.log2(info.smallest_normal) - 9, np.log2(info.max) + 1
    exponents = torch.arange(low, high, 0.5 if dtype == "float16" else 3)

    def make(seed: int) -> PagedKVCache:
        blocks = -(-2 * len(exponents) // 16)
        cache = build_cache("flash", layers=1, heads=1, blocks=blocks, dtype=DTYPES[dtype])
        noise = torch.Generator().manual_seed(seed)
        values = torch.randn(len(exponents), 2, 1, 64, dtype=torch.float64, generator=noise)
        values *= 2.0 ** exponents.double()[:, None, None, None]
        slots = np.arange(len(exponents))
        cache.scatter(0, slots, values.clamp(-info.max, info.max).to(cache.dtype))
        storage, random = cache.bits(0), np.random.default_rng(seed)
        half = storage.size // 2
        storage[half:] = random.integers(0, np.iinfo(storage.dtype).max, storage.size - half)
        return on(cache, device)

    cache = make(0)
    check(codec_of(codec, cache), make, np.arange(cache.num_slots))


def cut_chunks(codec: str, dtype: str, device: str) -> None:
    """Chunks larger than the buffer are cut; no token is no work, and warmup writes nothing."""

    def make(seed: int) -> PagedKVCache:
        small = {"layers": 1, "heads": 1, "blocks": 2}  # klt takes long to interpret
        return on(build_cache("flash", **small, dtype=DTYPES[dtype], seed=seed), device)

    cache = make(0)
    tested = codec_of(codec, cache)
    before = everything(cache)
    device_path.warmup(tested, cache)
    none = np.zeros(0, np.int64)
    empty = {t: np.zeros((0, tested.bytes_per_token(t)), np.uint8) for t in tested.tiers}
    device_path.encode(tested, cache, none, empty, 0)
    device_path.decode(tested, list(empty.values()), cache, none, 0)
    assert torch.equal(everything(cache), before)
    size, device_path.BUFFER_BYTES = device_path.BUFFER_BYTES, 1_600
    try:
        check(tested, make, np.arange(30)[::-1].copy())
    finally:
        device_path.BUFFER_BYTES = size


CASES: dict[str, tuple[Callable[[str, str, str], None], str, str]] = {
    f"{case.__name__}-{codec}-{dtype}": (case, codec, dtype)
    for case in (shapes, magnitudes, cut_chunks)
    for codec in CODECS
    for dtype in DTYPES
    if (case is not cut_chunks or dtype == "bfloat16")
    and (case is not magnitudes or codec != "klt")
}
