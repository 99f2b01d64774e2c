# SPDX-License-Identifier: Apache-2.0
"""Page layout of the installed vLLM, found by its own op, and the caches that are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lynx_connector.engine.kv_layout import KVLayoutError, build_paged_cache, probe_cpu_page

HEADS, HEAD_DIM, BLOCK = 3, 64, 128


def zero_caches(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    return {f"layer{i}": torch.zeros(4, HEADS, BLOCK, 2 * HEAD_DIM, dtype=dtype) for i in range(2)}


def wrap(caches: dict, **changes):
    spec = {
        "block_size": BLOCK,
        "num_kv_heads": HEADS,
        "head_dim": HEAD_DIM,
        "dtype": torch.bfloat16,
    }
    return build_paged_cache(caches, **(spec | changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("head_dim", "block"), [(64, 128), (80, 32), (128, 32)])
def test_cache_written_by_vllm_is_read_back(dtype, head_dim, block) -> None:
    """Keys and values stored by vLLM's CPU op for scattered slots come back in place."""
    ops = pytest.importorskip("vllm._custom_ops")
    cpu_attn = pytest.importorskip("vllm.v1.attention.backends.cpu_attn")
    registered = torch.zeros(4, HEADS, block, 2 * head_dim, dtype=dtype)
    cache = build_paged_cache(
        {"layer": registered}, block_size=block, num_kv_heads=HEADS, head_dim=head_dim, dtype=dtype
    )
    tokens = 2 * block + 5
    slots = np.random.default_rng(0).permutation(4 * block)[:tokens]
    key, value = torch.randn(2, tokens, HEADS, head_dim).to(dtype)
    pages = registered.view(4, HEADS, 2 * block, head_dim).chunk(2, dim=2)
    isa = cpu_attn._get_attn_isa(dtype, block, head_dim)
    ops.cpu_attn_reshape_and_cache(key, value, *pages, torch.from_numpy(slots), isa)
    assert torch.equal(cache.gather(0, slots), torch.stack((key, value), dim=1))


def test_split_kernel_blocks_keep_the_slots() -> None:
    """A manager block of 128 registered as two kernel blocks of 64: slot numbers stay valid."""
    pytest.importorskip("vllm")
    caches = {"layer": torch.zeros(8, HEADS, 64, 2 * HEAD_DIM, dtype=torch.bfloat16)}
    cache = wrap(caches, block_size=128)
    assert (cache.block_size, cache.num_slots) == (64, 512)


def test_a_page_that_is_no_permutation_is_refused(monkeypatch) -> None:
    pytest.importorskip("vllm")
    import lynx_connector.engine.kv_layout as kv_layout

    monkeypatch.setattr(
        kv_layout, "_written_page", lambda digit, *_: np.zeros(len(digit), dtype=np.int64)
    )
    with pytest.raises(KVLayoutError, match=r"ISA \w+, torch.bfloat16, block size 128"):
        probe_cpu_page(128, 64, torch.bfloat16)


def test_quantised_caches_are_refused() -> None:
    caches = {k: v.to(torch.float8_e4m3fn) for k, v in zero_caches().items()}
    with pytest.raises(KVLayoutError, match=r"layer0.*float8_e4m3fn.*quantised"):
        wrap(caches)


def test_mla_caches_are_refused() -> None:
    with pytest.raises(KVLayoutError, match="MLA"):
        wrap({"layer": torch.zeros(4, 1, BLOCK, 576, dtype=torch.bfloat16)})


def test_state_caches_are_refused() -> None:
    with pytest.raises(KVLayoutError, match="mamba: list"):
        wrap({"mamba": [torch.zeros(1), torch.zeros(1)]})


def test_layers_that_differ_are_refused() -> None:
    pytest.importorskip("vllm")
    caches = zero_caches()
    caches["odd"] = torch.zeros(7, HEADS, BLOCK, 2 * HEAD_DIM, dtype=torch.bfloat16)
    with pytest.raises(KVLayoutError, match="odd and layer0 differ in shape"):
        wrap(caches)


def test_empty_registration_and_wrong_block_size_are_refused() -> None:
    with pytest.raises(KVLayoutError, match="no KV cache"):
        wrap({})
    with pytest.raises(KVLayoutError, match="not a multiple of the registered 128"):
        wrap(zero_caches(), block_size=192)
