# SPDX-License-Identifier: Apache-2.0
"""The worker of `make gpu-check` with kernels that fail: hadamard's decoder writes one wrong bit,
int8's encoder raises, int4's kills its process."""

from __future__ import annotations

import json
import os
import signal
import sys

import torch

from scripts.gpu_check import worker
from scripts.gpu_check.cases import Case
from scripts.gpu_check.checkout import use_checkout


def break_kernels() -> None:
    from scripts.gpu_check import kernels

    decode = kernels.Hadamard.decode

    def wrong(self: kernels.Hadamard, rows: list[torch.Tensor]) -> None:
        decode(self, rows)
        cache, slots = self.load.target, self.load.slots[2:3]
        values = cache.gather(0, slots)
        values.view(torch.int16)[0, 1, 0, 5] ^= 1
        cache.scatter(0, slots, values)

    def encode(self: kernels.Uniform) -> None:
        if self.bits == 8:
            raise ValueError("no such instruction\nand more")
        os.kill(os.getpid(), signal.SIGSEGV)

    kernels.Hadamard.decode = wrong
    kernels.Uniform.encode = encode


if __name__ == "__main__":
    use_checkout()
    break_kernels()
    sys.exit(worker.main([Case(*fields) for fields in json.loads(sys.argv[1])]))
