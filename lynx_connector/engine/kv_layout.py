# SPDX-License-Identifier: Apache-2.0
"""From the caches that vLLM registers to a `PagedKVCache`.

On CUDA, FlashAttention, FlashInfer and Triton attention store [K | V] along the content dimension
of the registered view `[blocks, heads, N, C]` (vLLM 0.32, `v1/attention/backends`). On CPU the
inner order of a page depends on the instruction set that vLLM picks (`cpu_attn._get_attn_isa`:
vec, vec16, amx, neon, ...), so it is found by letting vLLM's own op fill a scratch page.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from lynx_kernels.shared.paged import PagedKVCache, PageIndex

# bfloat16 carries the integers 0 to 256 exactly, so element numbers travel in base-256 digits.
_DIGIT = 256


class KVLayoutError(ValueError):
    """The registered KV cache has a form that Lynx cannot address; the text names it."""


def build_paged_cache(
    kv_caches: Mapping[str, torch.Tensor],
    *,
    block_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
) -> PagedKVCache:
    """Wrap the caches that vLLM passes to `register_kv_caches`.

    block_size, num_kv_heads, head_dim, dtype: of the model's KV cache spec on this rank.
    The result's block_size is that of the attention kernel where vLLM splits blocks; slots
    computed with either are the same. Raises KVLayoutError for MLA, quantised, non-uniform or
    otherwise unknown caches.
    """
    if not kv_caches:
        raise KVLayoutError("vLLM registered no KV cache")
    for name, cache in kv_caches.items():
        _check_cache(name, cache, num_kv_heads, head_dim, dtype)
    first = next(iter(kv_caches.values()))
    kernel_block_size = first.shape[2]
    if block_size % kernel_block_size:
        raise KVLayoutError(
            f"block size {block_size} is not a multiple of the registered {kernel_block_size}"
        )
    if first.device.type == "cpu":
        stride_n, stride_c = first.stride()[2:]
        if (stride_n, stride_c) != (2 * head_dim, 1):
            raise KVLayoutError(f"CPU KV cache pages are not contiguous: strides {first.stride()}")
        index = probe_cpu_page(kernel_block_size, head_dim, dtype)
    else:
        index = PageIndex.rows(kernel_block_size, head_dim, *first.stride()[2:])
    try:
        return PagedKVCache(kv_caches, kernel_block_size, num_kv_heads, head_dim, index)
    except ValueError as error:
        raise KVLayoutError(f"non-uniform KV cache: {error}") from None


def probe_cpu_page(block_size: int, head_dim: int, dtype: torch.dtype) -> PageIndex:
    """Inner order of a (block, head) page of vLLM's CPU attention on this machine.

    Numbers the page's 2 * N * D elements (K first, token-major), writes the numbers digit by
    digit through `cpu_attn_reshape_and_cache` and reads where they landed. Raises KVLayoutError
    unless that is a permutation.
    """
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    isa = _get_attn_isa(dtype, block_size, head_dim)
    elements = 2 * block_size * head_dim
    number = np.arange(elements)
    landed = np.zeros(elements, dtype=np.int64)
    weight = 1
    try:
        while weight < elements:
            digit = torch.from_numpy(number // weight % _DIGIT).to(dtype)
            landed += weight * _written_page(digit, block_size, head_dim, isa)
            weight *= _DIGIT
    except (RuntimeError, AttributeError, ImportError) as error:
        raise KVLayoutError(
            f"{_describe(isa, dtype, block_size, head_dim)}: cannot probe: {error}"
        ) from error
    if not np.array_equal(np.sort(landed), number):
        raise KVLayoutError(
            f"{_describe(isa, dtype, block_size, head_dim)} is not a permutation of K and V"
        )
    position = np.argsort(landed).reshape(2, block_size, head_dim)
    return PageIndex(position[0], position[1])


def _written_page(digit: torch.Tensor, block_size: int, head_dim: int, isa: str) -> np.ndarray:
    """The page, int64 [2 * N * D], after vLLM stored K = digit[: N * D] and V = the rest.

    Same views as in `CPUAttentionBackendImpl.do_kv_cache_update`.
    """
    from vllm import _custom_ops
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    key, value = digit.reshape(2, block_size, 1, head_dim)
    page = torch.full((1, 1, 2 * block_size, head_dim), -1.0, dtype=digit.dtype)
    key_cache, value_cache = page.chunk(2, dim=2)
    _custom_ops.cpu_attn_reshape_and_cache(
        key.contiguous(), value.contiguous(), key_cache, value_cache, torch.arange(block_size), isa
    )
    return page.flatten().to(torch.int64).numpy()


def _check_cache(
    name: str, cache: torch.Tensor, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    if not isinstance(cache, torch.Tensor):
        raise KVLayoutError(f"{name}: {type(cache).__name__} instead of one attention KV cache")
    if cache.dtype != dtype:
        raise KVLayoutError(
            f"{name}: KV cache dtype {cache.dtype} instead of {dtype}; quantised KV caches "
            "(kv_cache_dtype fp8, int8, ...) are not supported"
        )
    expected = f"[blocks, {num_kv_heads}, N, 2 * {head_dim}]"
    if cache.ndim != 4 or cache.shape[1] != num_kv_heads or cache.shape[3] != 2 * head_dim:
        raise KVLayoutError(
            f"{name}: KV cache shape {list(cache.shape)} is not {expected}; MLA and models whose "
            "layers differ in heads or head size are not supported"
        )


def _describe(isa: str, dtype: torch.dtype, block_size: int, head_dim: int) -> str:
    return f"CPU KV page layout (ISA {isa}, {dtype}, block size {block_size}, head size {head_dim})"
