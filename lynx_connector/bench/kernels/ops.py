# SPDX-License-Identifier: Apache-2.0
"""The operations that are measured: each a call on one workload.

On CPU the numba kernels, host rows to and from the paged cache. On CUDA the Triton kernels alone,
from and to device memory: the copy to the host is the link's, not theirs, and so are the exact
tier's checksums, which on CPU are part of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from lynx_kernels.shared.paged import PagedKVCache

from lynx_connector.bench.errors import BenchError
from lynx_connector.bench.kernels.caches import Workload
from lynx_connector.codec import CODECS, Codec, Tier, get_codec
from lynx_connector.codec.exact import ExactTier
from lynx_connector.codec.klt import KltCodec
from lynx_connector.codec.klt_learner import TableLearner


@dataclass(frozen=True)
class Op:
    """`run` does the whole workload once; `prepare` comes before each run and is not timed."""

    name: str
    codec: str
    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


def check_codecs(names: list[str]) -> None:
    """Raises BenchError for a codec that does not exist."""
    for name in names:
        if name not in CODECS:
            raise BenchError(f"unknown codec {name!r}; known codecs: {', '.join(CODECS)}")


def copy_op(load: Workload) -> Op:
    """A plain copy of as many contiguous bytes as the workload's KV has."""
    source = torch.ones(load.num_bytes, dtype=torch.uint8, device=load.cache.device)
    target = torch.zeros_like(source)
    return Op("copy", "", partial(target.copy_, source))


def make_ops(name: str, load: Workload) -> list[Op]:
    """All operations of a codec, ready to be timed: compiled, rows filled."""
    codec = _codec(name, load)
    ops = _device_ops(codec, load) if load.cache.device.type == "cuda" else _cpu_ops(codec, load)
    for op in ops:
        op.prepare()
        op.run()
    return ops


def _codec(name: str, load: Workload) -> Codec:
    tables = None
    if name == KltCodec.name:  # what the tables say does not matter here, only that they are valid
        learner = TableLearner(load.geometry)
        learner.observe(load.cache, load.slots, 0)
        tables = learner.build()
    return get_codec(name, load.geometry, tables=tables)


def _cpu_ops(codec: Codec, load: Workload) -> list[Op]:
    slots = load.slots
    rows = {t: np.zeros((len(slots), codec.bytes_per_token(t)), np.uint8) for t in codec.tiers}
    encode = partial(codec.encode, load.cache, slots, rows)
    ops = _tier_ops(codec.name, encode, codec.decode, list(rows.values()), load.refined, slots)
    return ops if len(rows) == 1 else ops + _exact_ops(codec, load, rows[Tier.ANCHOR])


def _tier_ops(
    name: str,
    encode: Callable[[], object],
    decode: Callable[..., object],
    tiers: list[Any],
    refined: PagedKVCache,
    slots: Any,
) -> list[Op]:
    """Operations of a codec's own tiers; afterwards `refined` is what all of them together give."""
    anchor, patch = (partial(decode, part, refined, slots) for part in (tiers[:1], tiers))
    ops = [Op("encode", name, encode), Op("decode", name, anchor)]
    if len(tiers) > 1:
        ops.append(Op("patch", name, patch))
        encode()
        patch()
    return ops


def _exact_ops(codec: Codec, load: Workload, anchor: np.ndarray) -> list[Op]:
    """`refined` must hold the reconstruction from both tiers: decoding works in place on it."""
    exact, slots = ExactTier(codec), load.slots
    encode = partial(exact.encode, load.cache, slots, load.refined, slots, anchor)
    data, lengths = encode()
    decode = partial(exact.decode, data, lengths, load.refined, slots, anchor)
    return _in_place(codec, load, encode, decode)


def _exact_device_ops(codec: Codec, load: Workload, anchor: torch.Tensor) -> list[Op]:
    """As `_exact_ops`, by the chunks in which it is used."""
    from lynx_connector.codec.exact_device import DeviceCoder

    device = load.cache.device
    coder = ExactTier(codec).coder(device)
    assert isinstance(coder, DeviceCoder)
    spread = torch.from_numpy(codec.error_spread(anchor.cpu().numpy())).to(device)
    parts = [slice(i, i + coder.chunk) for i in range(0, len(load.slots), coder.chunk)]

    def encode() -> list[tuple[torch.Tensor, torch.Tensor]]:
        true, coarse = (partial(coder.words, cache) for cache in (load.cache, load.refined))
        return [
            coder.encode_device(true(load.slots[part]), coarse(load.slots[part]), spread[part])
            for part in parts
        ]

    encoded = [(data, lengths.cpu().numpy().astype(np.uint32)) for data, lengths in encode()]

    def decode() -> None:
        for part, (data, lengths) in zip(parts, encoded, strict=True):
            coarse = coder.words(load.refined, load.slots[part])
            true = coder.decode_device(data, lengths, coarse, spread[part])
            coder.write(load.refined, load.slots[part], true)

    return _in_place(codec, load, encode, decode)


def _in_place(
    codec: Codec, load: Workload, encode: Callable[[], object], decode: Callable[[], object]
) -> list[Op]:
    """Operations of the exact tier; before each `refined` is what it is now."""
    slots = load.slots
    coarse = [load.refined.gather(layer, slots) for layer in range(load.refined.num_layers)]

    def restore() -> None:
        for layer, values in enumerate(coarse):
            load.refined.scatter(layer, slots, values)

    return [
        Op("exact encode", codec.name, encode, restore),
        Op("exact decode", codec.name, decode, restore),
    ]


def _device_ops(codec: Codec, load: Workload) -> list[Op]:
    device = load.cache.device
    slots = torch.from_numpy(load.slots).to(device)
    rows = {
        t: torch.zeros((len(slots), codec.bytes_per_token(t)), dtype=torch.uint8, device=device)
        for t in codec.tiers
    }
    encode, tiers = partial(codec.encode_device, load.cache, slots, rows), list(rows.values())
    ops = _tier_ops(codec.name, encode, codec.decode_device, tiers, load.refined, slots)
    return ops if len(rows) == 1 else ops + _exact_device_ops(codec, load, rows[Tier.ANCHOR])
