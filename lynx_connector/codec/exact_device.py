# SPDX-License-Identifier: Apache-2.0
"""The exact tier's coder for caches on a GPU: values stay there, encoded bytes travel."""

from __future__ import annotations

import numpy as np
import torch
from lynx_kernels.exact import gpu as exact_gpu
from lynx_kernels.raw import gpu as raw_gpu
from lynx_kernels.shared.paged import PagedKVCache
from numpy.typing import NDArray

from lynx_connector.codec.device import download, upload

_SCRATCH_BYTES = 128 << 20
"""Most device memory for one chunk, about. A token occupies one warp, so that small chunks leave
most of the device idle."""


class DeviceCoder:
    """`exact.Coder`; words are tensors on `device`, uint16 or uint32 [T, elements]."""

    def __init__(
        self, kind: int, tilt: NDArray[np.int16], header: int, device: torch.device
    ) -> None:
        self._kind = kind
        self._header = header
        self._word = (torch.uint16, torch.uint16, torch.uint32)[kind]
        self._tilt = upload(tilt, device)
        # True and reconstructed values, and room for what does not compress.
        self.chunk = max(1, _SCRATCH_BYTES // (tilt.size * (2 * self._word.itemsize + 5)))

    def words(self, cache: PagedKVCache, slots: NDArray[np.int64]) -> torch.Tensor:
        tokens = len(slots)
        words = torch.empty((tokens, self._tilt.numel()), dtype=self._word, device=cache.device)
        raw_gpu.encode(cache, upload(slots, cache.device), words.view(torch.uint8))
        return words

    def write(self, cache: PagedKVCache, slots: NDArray[np.int64], words: torch.Tensor) -> None:
        raw_gpu.decode(cache, upload(slots, cache.device), words.view(torch.uint8))

    def encode(
        self, true: torch.Tensor, coarse: torch.Tensor, spread: NDArray[np.int16]
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint32]]:
        data, lengths = self.encode_device(true, coarse, upload(spread, true.device))
        return download(data), download(lengths).astype(np.uint32)

    def decode(
        self,
        data: NDArray[np.uint8],
        lengths: NDArray[np.uint32],
        coarse: torch.Tensor,
        spread: NDArray[np.int16],
    ) -> torch.Tensor:
        device = coarse.device
        return self.decode_device(upload(data, device), lengths, coarse, upload(spread, device))

    def encode_device(
        self, true: torch.Tensor, coarse: torch.Tensor, spread: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Bytes uint8 [n] and lengths int64 [T], left on the device; spread: int16 [T, V]."""
        return exact_gpu.encode(true, coarse, spread, self._tilt, self._kind, self._header)

    def decode_device(
        self,
        data: torch.Tensor,
        lengths: NDArray[np.uint32],
        coarse: torch.Tensor,
        spread: torch.Tensor,
    ) -> torch.Tensor:
        """Inverse of `encode_device`. Raises ValueError for bytes that nothing is encoded to."""
        return exact_gpu.decode(data, lengths, coarse, spread, self._tilt, self._kind, self._header)

    def on_host(self, words: torch.Tensor) -> NDArray:
        return download(words)
