# SPDX-License-Identifier: Apache-2.0
"""Work beside the model's own stream: on CUDA a stream of its own, on CPU nothing to order."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class SideStream:
    """Orders encoding behind the forward pass that wrote the blocks, without holding it up."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def record(self) -> object | None:
        """Mark the work queued on the current stream so far (main thread)."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    @contextmanager
    def after(self, mark: object | None) -> Iterator[None]:
        """Run the body on the side stream after `mark`; its results are on the host at the end."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            if isinstance(mark, torch.cuda.Event):
                self._stream.wait_event(mark)
            yield
        self._stream.synchronize()
