# SPDX-License-Identifier: Apache-2.0
"""The exact tier's Triton kernels against `reference.py` and `cpu.py`, byte for byte.

How many lanes a token has follows from its length. The interpreter takes milliseconds a step, so
that there the number is given and a program takes more tokens than fill a warp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch
from lynx_kernels.exact import cpu as exact_cpu
from lynx_kernels.exact import gpu as exact_gpu
from lynx_kernels.exact import reference as exact
from lynx_kernels.exact.code import WIDTH
from lynx_kernels.shared.error_steps import NO_ERROR
from lynx_kernels.shared.tiles_cpu import KIND
from triton.runtime.interpreter import InterpreterBuilder

from lynx_connector.bench.kernels import caches, ops
from lynx_connector.codec import CodecError, Tier
from lynx_connector.codec.exact import ExactTier
from lynx_connector.codec.exact_device import DeviceCoder
from lynx_connector.codec.types import DTYPES
from tests.unit.conftest import build_cache
from tests.unit.kernels.triton_cases import codec_of, on, poisoned

HEADER = 8
GUARD = 4096  # bytes before and behind encoded ones, never to be read
HEAD_DIMS = (64, 80, 96, 128, 192, 256)


@contextmanager
def lanes(count: int, device: str) -> Iterator[None]:
    with (
        mock.patch.object(exact, "lanes_of", lambda elements: count),
        mock.patch.object(exact_cpu, "lanes_of", lambda elements: count),
        mock.patch.object(exact_gpu, "lanes_of", lambda elements: count),
        mock.patch.object(exact_gpu, "_WARP", 32 if device == "cuda" else 1024),
    ):
        yield


@contextmanager
def loads_only_inside(data: torch.Tensor) -> Iterator[None]:
    """Interpreted, fails a load from the guard bytes around `data`."""
    load = InterpreterBuilder.create_masked_load

    def checked(self, ptrs, mask, *arguments):
        offset = ptrs.data[mask.data].astype(np.int64) - data.data_ptr()
        beside = (offset >= -GUARD) & (offset < len(data) + GUARD)
        assert not (beside & ((offset < 0) | (offset >= len(data)))).any(), "read outside"
        return load(self, ptrs, mask, *arguments)

    with mock.patch.object(InterpreterBuilder, "create_masked_load", checked):
        yield


class Sample:
    """Random tokens [T, V * D]: true and coarse near each other or of no relation at all, expected
    errors that fit and that do not, all special values."""

    def __init__(self, dtype: str, shape: tuple[int, int, int], device: str, seed: int = 0) -> None:
        self.kind, self.device = KIND[DTYPES[dtype]], device
        tokens, vectors, head_dim = shape
        size = tokens, vectors * head_dim
        rng = np.random.default_rng(seed)
        width = WIDTH[self.kind]
        word = np.uint16 if width == 16 else np.uint32
        reach = rng.choice([0, 1, 30, 3000, 1 << width], (tokens, 1))
        coarse = rng.integers(0, 1 << width, size)
        near_one = (0x3F80, 0x3C00, 0x3F800000)[self.kind] + rng.integers(0, 100, size)
        coarse = np.where(rng.random((tokens, 1)) < 0.5, near_one, coarse)
        self.coarse = coarse.astype(word)
        self.true = (coarse + rng.integers(-reach, reach + 1, size)).astype(word)
        infinity = (0x7F80, 0x7C00, 0x7F800000)[self.kind]
        special = [0, 1, infinity, infinity + 1, infinity - 1, (1 << width - 1) - 1]
        special += [value | 1 << width - 1 for value in special]  # zeros, denormals, NaN, ...
        self.true[0, : len(special)] = special
        self.coarse[1 % tokens, : len(special)] = special
        low, high = np.array([(-300, 300), (-60, 20), (NO_ERROR, NO_ERROR + 1)]).T
        of = rng.integers(0, len(low), (tokens, 1))
        self.spread = rng.integers(low[of], high[of], (tokens, vectors)).astype(np.int16)
        self.tilt = rng.integers(-9, 9, (vectors, head_dim)).astype(np.int16)

    def on_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        """Bytes and lengths from both other implementations."""
        sigma = (self.spread[:, :, None] + self.tilt).reshape(self.true.shape).astype(np.int16)
        tokens = exact.encode(self.true, self.coarse, sigma, self.kind)
        data, lengths = exact_cpu.encode(
            self.true, self.coarse, self.spread, self.tilt, self.kind, HEADER
        )
        behind = np.zeros(HEADER, np.uint8)
        assert np.array_equal(data, np.concatenate([p for t in tokens for p in (behind, t)]))
        return data, lengths

    def encode(self) -> tuple[np.ndarray, np.ndarray]:
        arrays = (self.true, self.coarse, self.spread, self.tilt)
        data, lengths = exact_gpu.encode(*map(self.on_device, arrays), self.kind, HEADER)
        return data.cpu().numpy(), lengths.cpu().numpy().astype(np.uint32)

    def decode(self, data: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        arrays = map(self.on_device, (self.coarse, self.spread, self.tilt))
        around = torch.full((len(data) + 2 * GUARD,), 255, dtype=torch.uint8, device=self.device)
        there = around[GUARD : GUARD + len(data)]
        there.copy_(torch.from_numpy(data))
        with loads_only_inside(there):
            true = exact_gpu.decode(there, lengths, *arrays, self.kind, HEADER)
        return true.cpu().numpy()

    def decode_on_cpu(self, data: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        arrays = self.coarse, self.spread, self.tilt
        return exact_cpu.decode(data, lengths, *arrays, self.kind, HEADER)


def agree(sample: Sample) -> None:
    data, lengths = sample.expected()
    got, sizes = sample.encode()
    assert sizes.tolist() == lengths.tolist()
    assert np.array_equal(got, data)
    assert np.array_equal(sample.decode(data, lengths), sample.true)


def exact_bits(_: str, dtype: str, device: str) -> None:
    """Any bits, any number of lanes; no token, one token, a program that is not full."""
    for count in (1, 2, 8, 32):
        with lanes(count, device):
            agree(Sample(dtype, (37, 2, 16), device))
    with lanes(32, device):
        agree(Sample(dtype, (1, 3, 32), device, 1))
        none = Sample(dtype, (3, 1, 32), device)
        none.true, none.coarse, none.spread = none.true[:0], none.coarse[:0], none.spread[:0]
        assert [len(part) for part in none.encode()] == [0, 0]
        assert none.decode(np.zeros(0, np.uint8), np.zeros(0, np.uint32)).shape == (0, 32)
    if device == "cuda":
        for head_dim in HEAD_DIMS:  # lanes as the format has them: 8 and more
            agree(Sample(dtype, (70, 100, head_dim), device, head_dim))
        agree(Sample(dtype, (5, 1024, 64), device, 2))


def exact_bad_bytes(_: str, dtype: str, device: str) -> None:
    """A token behind two good ones, changed anyhow, is refused or decoded as on the CPU."""
    rng = np.random.default_rng(0)
    sample = Sample(dtype, (3, 1, 64), device, 4)
    verdicts = set()
    with lanes(32, device):
        clean, whole = sample.encode()
        begin = int(whole[:2].sum())
        for change in range(24):
            token = clean[begin:].copy()
            if change % 8 == 7:  # states that no encoder ends with
                token[HEADER : HEADER + 4 * 32] = 0
            elif change % 3 == 0:  # states and words
                token[rng.integers(HEADER, len(token), 1 + change % 4)] ^= np.uint8(1 << change % 8)
            elif change % 3 == 1:
                token = token[: max(len(token) - 2 * int(rng.integers(1, 9)), HEADER + 4 * 32)]
            else:
                token = np.append(token, rng.integers(0, 256, 2 * int(rng.integers(1, 9))))
            data = np.concatenate([clean[:begin], token.astype(np.uint8)])
            lengths = np.array([*whole[:2], len(token)], np.uint32)
            results = []
            for decode in (sample.decode_on_cpu, sample.decode):
                try:
                    results.append(decode(data, lengths).tobytes())
                except ValueError as error:
                    results.append(str(error))
            assert results[0] == results[1], change
            verdicts.add(type(results[0]))
        assert str in verdicts
        for wrong, text in (
            (whole + np.uint32([0, 0, 2]), "add up"),
            (whole + np.uint32([1, 0, 0]) - np.uint32([0, 1, 0]), "odd"),
            (np.array([len(clean) - 16, 8, 8], np.uint32), "too few"),
        ):
            refused(ValueError, text, sample.decode, clean, wrong)


def exact_tier(codec: str, dtype: str, device: str) -> None:
    """Behind a codec, every head size: the bytes of the CPU, and the true bits again."""
    for head_dim in HEAD_DIMS if codec == "hadamard" else (64,):
        shape = {"layers": 1, "heads": 1, "head_dim": head_dim, "blocks": 1}
        true = poisoned(build_cache("flash", dtype=DTYPES[dtype], **shape))
        storage, rng = true.bits(0), np.random.default_rng(head_dim)
        random = slice(storage.size // 2, None)
        storage[random] = rng.integers(0, np.iinfo(storage.dtype).max, storage[random].shape)
        refined = build_cache("cpu_vec", dtype=DTYPES[dtype], **shape)
        slots = rng.permutation(16)[:5]
        tested = codec_of(codec, true)
        rows = {t: np.zeros((5, tested.bytes_per_token(t)), np.uint8) for t in tested.tiers}
        tested.encode(true, slots, rows)
        tested.decode(list(rows.values()), refined, slots)
        with lanes(32, device):
            tier, anchor = ExactTier(tested), rows[Tier.ANCHOR]
            expected, sizes = tier.encode(true, slots, refined, slots, anchor)
            there = on(refined, device)
            with on_device(tier, there.device):
                data, lengths = tier.encode(on(true, device), slots, there, slots, anchor)
                assert np.array_equal(lengths, sizes) and np.array_equal(data, expected), head_dim
                if head_dim == 64:
                    before = there.gather(0, slots).clone()
                    data[sizes[0]] ^= 1  # the second token's checksum
                    wrong = "checksum of token 1"
                    refused(CodecError, wrong, tier.decode, data, sizes, there, slots, anchor)
                    data[sizes[0]] ^= 1
                    assert torch.equal(words(there.gather(0, slots)), words(before))
                tier.decode(data, lengths, there, slots, anchor)
        same = words(there.gather(0, slots)) == words(true.gather(0, slots))
        assert same.all(), head_dim


@contextmanager
def on_device(tier: ExactTier, device: torch.device) -> Iterator[None]:
    """Code with the Triton kernels, wherever the cache is, and in two chunks."""
    tilt = np.ascontiguousarray(tier.codec.error_tilt.reshape(-1, tier.codec.geometry.head_dim))
    coder = DeviceCoder(KIND[tier.codec.dtype], tilt, HEADER, device)
    coder.chunk = 4
    with mock.patch.object(tier, "coder", lambda device: coder):
        yield


def words(values: torch.Tensor) -> torch.Tensor:
    return values.cpu().view(torch.int32 if values.element_size() == 4 else torch.int16)


def refused(
    kind: type[Exception], text: str, run: Callable[..., object], *arguments: object
) -> None:
    try:
        run(*arguments)
    except kind as error:
        assert text in str(error), error
    else:
        raise AssertionError(f"not refused: {text}")


def exact_bench(codec: str, dtype: str, device: str) -> None:
    """`lynx bench kernels` has the operations, and decoding restores the cache."""
    small = mock.patch.multiple(caches, NUM_LAYERS=1, NUM_KV_HEADS=1)
    with small, lanes(32, device):
        load = caches.workload(64, dtype, 9, device)
        tested = codec_of(codec, load.cache)
        coder = DeviceCoder(
            KIND[tested.dtype], np.zeros((2, 64), np.int16), HEADER, load.cache.device
        )
        with mock.patch.object(ExactTier, "coder", lambda self, device: coder):
            found = ops._device_ops(tested, load)
        assert [op.name for op in found[-2:]] == ["exact encode", "exact decode"]
        for op in found:
            op.prepare()
            op.run()
    assert torch.equal(
        load.refined.gather(0, load.slots).cpu(), load.cache.gather(0, load.slots).cpu()
    )


EXACT_CASES: dict[str, tuple[Callable[[str, str, str], None], str, str]] = {
    f"{case.__name__}-{dtype}": (case, "", dtype)
    for case in (exact_bits, exact_bad_bytes)
    for dtype in DTYPES
} | {
    f"{case.__name__}-{codec}-{dtype}": (case, codec, dtype)
    for case, codec, dtype in (
        *((exact_tier, "hadamard", dtype) for dtype in DTYPES),
        (exact_tier, "klt", "bfloat16"),
        (exact_bench, "hadamard", "bfloat16"),
    )
}
