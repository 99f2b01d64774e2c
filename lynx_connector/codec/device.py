# SPDX-License-Identifier: Apache-2.0
"""Between tier rows in host memory and a paged cache on a device.

A chunk's tiers lie in one contiguous device buffer, filled by one launch for all layers and moved
by one asynchronous copy from or to pinned memory. Long chunks are cut, so that the buffer stays
small; while one part is copied to its rows, the next one is encoded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from lynx_kernels.shared.paged import PagedKVCache
from numpy.typing import NDArray

from lynx_connector.codec.types import Rows, Tier

BUFFER_BYTES = 64 << 20
"""Most bytes of tiers in one device buffer."""
_ALIGNMENT = 256


class DeviceCodec(Protocol):
    """What is asked of a `Codec` here."""

    @property
    def tiers(self) -> tuple[Tier, ...]: ...

    def bytes_per_token(self, tier: Tier) -> int: ...

    def encode_device(
        self,
        cache: PagedKVCache,
        slots: torch.Tensor,
        out: Mapping[Tier, torch.Tensor],
        first_position: int = 0,
    ) -> None: ...

    def decode_device(
        self,
        tiers: Sequence[torch.Tensor],
        cache: PagedKVCache,
        slots: torch.Tensor,
        first_position: int = 0,
    ) -> None: ...


class _Buffer:
    """One allocation, cut into aligned pieces of the given bytes."""

    def __init__(self, sizes: Sequence[int], device: torch.device, pinned: bool = False) -> None:
        ends = np.cumsum([-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes])
        self._sizes, self._starts = sizes, [0, *ends[:-1].tolist()]
        # torch keeps pinned memory for the next call, and not before a copy from or to it is done.
        self.memory = torch.empty(
            int(ends[-1]), dtype=torch.uint8, device=device, pin_memory=pinned
        )

    def piece(self, number: int) -> torch.Tensor:
        return self.memory.narrow(0, self._starts[number], self._sizes[number])

    def copy_from(self, other: _Buffer) -> None:
        """Queue a copy of everything on the current stream."""
        self.memory.copy_(other.memory, non_blocking=True)


def encode(
    codec: DeviceCodec,
    cache: PagedKVCache,
    slots: NDArray[np.int64],
    out: Mapping[Tier, Rows],
    first_position: int,
) -> None:
    """`Codec.encode` for a cache that is not in CPU memory; arguments are checked already."""
    pending: tuple[slice, _Buffer, torch.cuda.Event | None] | None = None
    for part in _parts(codec, len(slots)):
        tokens = part.stop - part.start
        sizes = [tokens * codec.bytes_per_token(tier) for tier in codec.tiers]
        there = _Buffer(sizes, cache.device)
        rows = {
            tier: there.piece(number).view(tokens, -1) for number, tier in enumerate(codec.tiers)
        }
        codec.encode_device(
            cache, upload(slots[part], cache.device), rows, first_position + part.start
        )
        here = _host_buffer(sizes, cache.device)
        here.copy_from(there)
        if pending is not None:
            _take(codec, out, *pending)
        pending = part, here, _mark(cache.device)
    if pending is not None:
        _take(codec, out, *pending)


def decode(
    codec: DeviceCodec,
    tiers: Sequence[Rows],
    cache: PagedKVCache,
    slots: NDArray[np.int64],
    first_position: int,
) -> None:
    """`Codec.decode` for a cache that is not in CPU memory; queued on the current stream."""
    for part in _parts(codec, len(slots)):
        tokens = part.stop - part.start
        sizes = [8 * tokens, *(rows[part].size for rows in tiers)]
        here, there = _host_buffer(sizes, cache.device), _Buffer(sizes, cache.device)
        _as_numpy(here.piece(0)).view(np.int64)[:] = slots[part]
        for number, rows in enumerate(tiers, 1):
            _as_numpy(here.piece(number))[:] = rows[part].reshape(-1)
        there.copy_from(here)
        codec.decode_device(
            [there.piece(number).view(tokens, -1) for number in range(1, len(sizes))],
            cache,
            there.piece(0).view(torch.int64),
            first_position + part.start,
        )


def warmup(codec: DeviceCodec, cache: PagedKVCache) -> None:
    """Compile every kernel for exactly this cache: launches that have no token to work on."""
    slots = torch.empty(0, dtype=torch.int64, device=cache.device)
    rows = [
        torch.empty((0, codec.bytes_per_token(tier)), dtype=torch.uint8, device=cache.device)
        for tier in codec.tiers
    ]
    codec.encode_device(cache, slots, dict(zip(codec.tiers, rows, strict=True)))
    for count in range(1, len(rows) + 1):
        codec.decode_device(rows[:count], cache, slots)


def upload(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """A copy on the device, queued on the current stream; aligned to 16 bytes."""
    here, there = _host_buffer([array.nbytes], device), _Buffer([array.nbytes], device)
    words = _as_numpy(here.piece(0)).view(array.dtype).reshape(array.shape)
    words[...] = array
    there.copy_from(here)
    return there.piece(0).view(torch.from_numpy(words).dtype).view(array.shape)


def download(values: torch.Tensor) -> NDArray[Any]:
    """A copy in host memory, complete when this returns."""
    on_gpu = values.device.type == "cuda"
    here = torch.empty(values.shape, dtype=values.dtype, pin_memory=on_gpu)
    here.copy_(values, non_blocking=True)
    if on_gpu:
        torch.cuda.current_stream(values.device).synchronize()
    return here.numpy()


def _parts(codec: DeviceCodec, tokens: int) -> Iterator[slice]:
    step = max(1, BUFFER_BYTES // sum(map(codec.bytes_per_token, codec.tiers)))
    for start in range(0, tokens, step):
        yield slice(start, min(start + step, tokens))


def _host_buffer(sizes: Sequence[int], device: torch.device) -> _Buffer:
    return _Buffer(sizes, torch.device("cpu"), pinned=device.type == "cuda")


def _mark(device: torch.device) -> torch.cuda.Event | None:
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record()
    return event


def _take(
    codec: DeviceCodec,
    out: Mapping[Tier, Rows],
    part: slice,
    here: _Buffer,
    done: torch.cuda.Event | None,
) -> None:
    """Copy a part's rows, once they have arrived in host memory, to where they belong."""
    if done is not None:
        done.synchronize()
    for number, tier in enumerate(codec.tiers):
        out[tier][part] = _as_numpy(here.piece(number)).reshape(part.stop - part.start, -1)


def _as_numpy(piece: torch.Tensor) -> NDArray[np.uint8]:
    return piece.numpy()
