# SPDX-License-Identifier: Apache-2.0
"""Rows as `lynx bench e2e` makes them."""

from lynx_connector.bench.e2e.rows import Row


def row(mode: str, tt32: float, **other: object) -> Row:
    values = {
        "link_mbit": 200.0,
        "prompt_tokens": 4097,
        "prefill": "cached",
        "concurrency": 1,
        "repeat": 0,
        "ttft_ms": 100.0,
        "tt8_ms": 200.0,
        "tt64_ms": 2 * tt32,
        "decode_step_ms": 40.0,
        "drafted": 0,
        "accepted": 0,
        "wire_bytes": 0,
        "cpu_s": 1.0,
    }
    return Row(**(values | {"mode": mode, "tt32_ms": tt32} | other))


SAMPLE = [
    row("single", 1000.0),
    row("single", 1100.0, prefill="cold"),
    row("nixl", 5000.0),
    row("lynx", 1900.0, drafted=20, accepted=18),
    row("lynx-int8", 3000.0),
    row("lynx", 1200.0, prefill="cold"),
    row("nixl", 1500.0, link_mbit=0.0),
    row("lynx", 1700.0, link_mbit=0.0),
    *(row("nixl", 6000.0 + n, concurrency=8) for n in range(8)),
    *(row("lynx", 2000.0 + 100 * n, concurrency=8) for n in range(8)),
]
