# SPDX-License-Identifier: Apache-2.0
"""Only caches that keep every token in a block of its request are accepted, by either half."""

from types import SimpleNamespace

import pytest
import torch
from vllm.v1 import kv_cache_interface as vllm_specs
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec, KVQuantMode

from lynx_connector.engine.cache_spec import NULL_BLOCK, check_cache_spec
from lynx_connector.engine.compat import check_supported
from lynx_connector.errors import ConfigError

SHAPE = {"block_size": 16, "num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16}


def spec(name, **fields):
    return getattr(vllm_specs, name)(**SHAPE | fields)


def uniform():
    layers = {"a": spec("FullAttentionSpec"), "b": spec("FullAttentionSpec", num_kv_heads=4)}
    return vllm_specs.UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs=layers)


def mamba():
    return vllm_specs.MambaSpec(
        block_size=16, shapes=((2, 3),), dtypes=(torch.float32,), mamba_type="mamba2"
    )


class TQFullAttentionSpec(FullAttentionSpec):
    """Some later vLLM's own kind."""


def check(*specs):
    """As the connector does at start-up, in the scheduler and in every worker."""
    parallel = SimpleNamespace(
        pipeline_parallel_size=1, decode_context_parallel_size=1, enable_dbo=False
    )
    groups = [KVCacheGroupSpec([f"layer{i}"], one) for i, one in enumerate(specs)]
    check_supported(
        SimpleNamespace(parallel_config=parallel, speculative_config=None),
        SimpleNamespace(kv_cache_groups=groups),
    )


def test_full_attention_is_accepted():
    check(spec("FullAttentionSpec"))
    # vLLM's own way with a mixture: all blocks are kept, the window is the kernel's affair.
    check(spec("FullAttentionSpec", sliding_window=128))
    check(spec("FullAttentionSpec", attention_chunk_size=128))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: spec("SlidingWindowSpec", sliding_window=128), "--disable-sliding-window"),
        (lambda: spec("ChunkedLocalAttentionSpec", attention_chunk_size=128), "attention chunk"),
        (lambda: spec("MLAAttentionSpec"), "MLA"),
        (lambda: spec("SlidingWindowMLASpec", sliding_window=128), "sliding window"),
        (lambda: spec("CrossAttentionSpec"), "encoder"),
        (lambda: TQFullAttentionSpec(**SHAPE), "TQFullAttentionSpec"),
        (uniform, "differs between layers"),
        (mamba, "Mamba"),
    ],
)
def test_others_are_refused_by_name_with_a_remedy(make, words):
    with pytest.raises(ConfigError, match=words) as caught:
        check(make())
    assert "another connector" in str(caught.value) or "--disable" in str(caught.value)


def test_every_kind_that_vllm_has_is_decided():
    """A subclass of full attention adds rules of its own: only the plain kind passes."""
    for name in dir(vllm_specs):
        kind = getattr(vllm_specs, name)
        if isinstance(kind, type) and issubclass(kind, vllm_specs.KVCacheSpec):
            if kind is FullAttentionSpec:
                continue
            with pytest.raises(ConfigError, match=name):
                check_cache_spec(object.__new__(kind))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dtype": torch.uint8}, "--kv-cache-dtype auto"),
        ({"dtype": torch.float8_e4m3fn}, "--kv-cache-dtype auto"),
        ({"kv_quant_mode": KVQuantMode(1)}, "--kv-cache-dtype auto"),
        ({"head_size_v": 32}, "32 elements"),
    ],
)
def test_shapes_that_no_codec_knows(fields, words):
    with pytest.raises(ConfigError, match=words):
        check(spec("FullAttentionSpec", **fields))


def test_a_mixture_is_refused():
    with pytest.raises(ConfigError, match="2 KV cache groups"):
        check(spec("FullAttentionSpec"), spec("FullAttentionSpec"))
    with pytest.raises(ConfigError, match="--disable-sliding-window"):
        check(spec("FullAttentionSpec"), spec("SlidingWindowSpec", sliding_window=128))


def test_the_null_block_is_vllms():
    pool = BlockPool(num_gpu_blocks=4, enable_caching=False, hash_block_size=16)
    assert pool.null_block.block_id == NULL_BLOCK
