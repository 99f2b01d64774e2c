# SPDX-License-Identifier: Apache-2.0
"""Rotations are read off vLLM's own rotary modules, for every kind that its models use."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lynx_kernels.shared.paged import PagedKVCache, PageIndex
from lynx_kernels.shared.rotation import NO_ROTATION
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import rotary_embedding

from lynx_connector.codec import KltCodec, KVGeometry, Tier
from lynx_connector.codec.klt_learner import TableLearner
from lynx_connector.engine import compat

D, HEADS, TOKENS, BLOCK = 64, 2, 1536, 16

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 2048,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 2048,
}
KNOWN = {
    "plain": ({"rope_theta": 10000.0}, True),
    "plain, large base": ({"rope_theta": 1000000.0}, True),
    "interleaved pairs": ({"rope_theta": 10000.0}, False),
    "llama3": (LLAMA3, True),
    "yarn": (YARN, True),
    "linear": ({"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0}, True),
    "ntk": ({"rope_type": "ntk", "rope_theta": 10000.0, "factor": 4.0}, True),
    "partial": ({"rope_theta": 10000.0, "partial_rotary_factor": 0.5}, True),
    "proportional": (
        {"rope_type": "proportional", "rope_theta": 1000000.0, "partial_rotary_factor": 0.25},
        True,
    ),
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * (D // 2),
    "long_factor": [4.0] * (D // 2),
    "original_max_position_embeddings": 2048,
}


@pytest.fixture
def get_rope(monkeypatch):
    """vLLM's factory with an empty registry, as in a process that has loaded one model."""
    monkeypatch.setattr(rotary_embedding, "_ROPE_DICT", {})
    config = VllmConfig()
    config.model_config = SimpleNamespace(max_model_len=1024)  # longrope asks
    with set_current_vllm_config(config):
        yield lambda parameters, is_neox=True, dtype=torch.bfloat16: rotary_embedding.get_rope(
            D, 4096, is_neox, dict(parameters), dtype
        )


def keys():
    """Keys before RoPE that have directions and a mean, as real ones do: [T, H, D]."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(D, D, generator=generator) * torch.logspace(0, -1.5, D)
    return torch.randn(TOKENS, HEADS, D, generator=generator) @ mix.T + 2 * mix[:, 0]


def rotated(module, plain):
    flat = plain.reshape(TOKENS, -1)
    _, turned = module.forward_native(torch.arange(TOKENS), flat.clone(), flat.clone())
    return turned.reshape(plain.shape).float()


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_turning_back_undoes_what_vllm_does(get_rope, name, dtype):
    parameters, is_neox = KNOWN[name]
    module = get_rope(parameters, is_neox, dtype)
    rotation = compat.key_rotation(D)
    assert rotation.pairs
    plain = keys()
    back = rotation.turn(rotated(module, plain), 0, back=True)
    radius = getattr(module, "mscale", 1.0)  # YaRN's factor scales all keys alike
    one, two = rotation.elements
    expected = plain.clone()
    expected[..., one + two] *= radius
    error = (back - expected).square().sum() / expected.square().sum()
    assert error < 1e-4  # a bfloat16 table alone makes 1e-5


@pytest.mark.parametrize("name", KNOWN)
def test_klt_before_rope_is_better_than_after_it(get_rope, name):
    parameters, is_neox = KNOWN[name]
    module = get_rope(parameters, is_neox)
    turned = rotated(module, keys())
    before, after = (anchor_error(turned, r) for r in (compat.key_rotation(D), NO_ROTATION))
    assert before < (0.95 if name in ("partial", "proportional") else 0.7) * after


def anchor_error(k, rotation):
    """|error|^2 / |K|^2 of the 4-bit anchor, V being the same as K."""
    pages = torch.cat((k, k), dim=-1).view(TOKENS // BLOCK, BLOCK, HEADS, 2 * D)
    pages = pages.transpose(1, 2).contiguous()
    index = PageIndex.rows(BLOCK, D, 2 * D)
    source = PagedKVCache({"l": pages}, BLOCK, HEADS, D, index)
    target = PagedKVCache({"l": torch.zeros_like(pages)}, BLOCK, HEADS, D, index)
    geometry = KVGeometry(1, HEADS, D, "float32")
    learner = TableLearner(geometry, rotation)
    slots = np.arange(TOKENS)
    learner.observe(source, slots, 0)
    codec = KltCodec(geometry, learner.build(), 4)
    rows = {tier: np.empty((TOKENS, codec.bytes_per_token(tier)), np.uint8) for tier in codec.tiers}
    codec.encode(source, slots, rows, 0)
    codec.decode([rows[Tier.ANCHOR]], target, slots, 0)
    error = (target.gather(0, slots) - source.gather(0, slots))[:, 0]
    return float(error.square().sum() / k.square().sum())


def test_frequencies_that_depend_on_the_length_are_not_known(get_rope, caplog):
    get_rope(LONGROPE)
    assert compat.key_rotation(D) == NO_ROTATION
    assert "rotation is not known" in caplog.text


def test_layers_that_differ_are_not_known(get_rope):
    """Gemma 3's local and global layers have bases of their own."""
    get_rope({"rope_theta": 10000.0})
    get_rope({"rope_theta": 1000000.0})
    assert compat.key_rotation(D) == NO_ROTATION


def test_a_model_without_rope(get_rope):
    assert compat.key_rotation(D) == NO_ROTATION
