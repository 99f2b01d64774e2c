# SPDX-License-Identifier: Apache-2.0
"""Time the CPU codecs on one core: nanoseconds per KV element, beside a plain memory copy.

    python benchmarks/bench_codec_cpu.py [--tokens 2048] [--repeat 9] [--layout cpu_vec]

Geometry of SmolLM2-135M (30 layers, 3 KV heads, head_dim 64, bfloat16): 11,520 elements a token.
Prints the fastest of `repeat` rounds, since everything slower is the machine's other work.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from lynx_kernels.paged import PagedKVCache, PageIndex

from lynx_connector.codec import CODECS, KVGeometry, get_codec

GEOMETRY = KVGeometry(num_layers=30, num_kv_heads=3, head_dim=64, dtype="bfloat16")


def gaussian_cache(layout: str, tokens: int) -> PagedKVCache:
    """`cpu_vec`: vLLM's CPU pages, blocks of 128; `flash`: FlashAttention rows, blocks of 16."""
    g = GEOMETRY
    block_size = 128 if layout == "cpu_vec" else 16
    index = PageIndex.rows(block_size, g.head_dim, 2 * g.head_dim)
    if layout == "cpu_vec":  # K as [D, N], then V as [N, D]
        n, d = np.arange(block_size)[:, None], np.arange(g.head_dim)[None, :]
        index = PageIndex(d * block_size + n, (block_size + n) * g.head_dim + d)
    shape = (tokens // block_size + 1, g.num_kv_heads, block_size, 2 * g.head_dim)
    caches = {f"layer{i}": torch.randn(shape).to(torch.bfloat16) for i in range(g.num_layers)}
    return PagedKVCache(caches, block_size, g.num_kv_heads, g.head_dim, index)


def fastest(repeat: int, work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--layout", choices=["cpu_vec", "flash"], default="cpu_vec")
    options = parser.parse_args()
    torch.set_num_threads(1)

    cache = gaussian_cache(options.layout, options.tokens)
    slots = np.arange(options.tokens, dtype=np.int64)
    elements = options.tokens * GEOMETRY.elements_per_token
    source = np.ones(elements, dtype=np.uint16)
    target = np.zeros_like(source)
    copy = fastest(options.repeat, lambda: np.copyto(target, source))
    print(f"{options.tokens} tokens, {elements / 1e6:.1f} M elements, layout {options.layout}")
    print(f"{'':22}{'encode':>9}{'decode':>9}   ns per element")
    print(f"{'plain copy (bf16)':22}{copy / elements * 1e9:9.2f}{copy / elements * 1e9:9.2f}")
    for name in CODECS:
        codec = get_codec(name, GEOMETRY)
        out = {
            tier: np.zeros((options.tokens, codec.bytes_per_token(tier)), dtype=np.uint8)
            for tier in codec.tiers
        }
        start = time.perf_counter()
        codec.warmup()
        ready = time.perf_counter() - start
        encode = fastest(options.repeat, lambda c=codec, o=out: c.encode(cache, slots, o))
        rows = list(out.values())
        for count in range(1, len(rows) + 1):
            decode = fastest(
                options.repeat, lambda c=codec, r=rows[:count]: c.decode(r, cache, slots)
            )
            label = " + ".join(tier.name.lower() for tier in codec.tiers[:count])
            print(
                f"{name + ' ' + label:22}{encode / elements * 1e9:9.2f}"
                f"{decode / elements * 1e9:9.2f}   ready in {ready:.2f} s"
            )


if __name__ == "__main__":
    main()
