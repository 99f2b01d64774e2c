# SPDX-License-Identifier: Apache-2.0
"""A model's rotary embedding without a running engine: vLLM's tables, proved on the model's K."""

from __future__ import annotations

import logging
from typing import Any

import torch

from lynx_connector.bench.hf_model import HFModel
from lynx_connector.codec.rotary import Rotary

_PROBE_TOKENS = 256
_PROBE_TOKEN = 5
_PROBE_ERROR = 0.02
"""Far above what rounding to a 16-bit cache leaves, far below what a wrong rotation leaves."""


def model_rotary(model: HFModel, dtype: torch.dtype = torch.float32) -> Rotary | None:
    """vLLM's tables for the model, or None where they do not undo its rotation of K.

    dtype: that vLLM would hold the tables in. Without tables, KLT is learned after RoPE.
    """
    parameters = getattr(model.config, "rope_parameters", None)
    if not parameters or any(isinstance(value, dict) for value in parameters.values()):
        return None  # none, or one for each kind of layer
    ids = [_PROBE_TOKEN] * _PROBE_TOKENS
    keys = model.prefill(ids)[:, 0, 0].float()
    for is_neox in (True, False):
        cos, sin = _vllm_tables(model, parameters, is_neox, dtype)
        if undoes_rotation(cos, sin, is_neox, keys):
            return Rotary(cos, sin, is_neox)
    return None


def undoes_rotation(
    cos: torch.Tensor, sin: torch.Tensor, is_neox: bool, keys: torch.Tensor
) -> bool:
    """Whether tables [positions, R / 2] turn one token's first-layer keys into the same vector.

    keys: [T, H, D], K of the first layer of T times the same token. That layer sees nothing but the
    token itself, so that its keys differ by their positions' rotation alone.
    """
    half = cos.shape[1]
    cos, sin = cos[: len(keys), None], sin[: len(keys), None]
    rotated = keys[..., : 2 * half]
    if is_neox:
        first, second = rotated[..., :half], rotated[..., half:]
    else:
        first, second = rotated[..., 0::2], rotated[..., 1::2]
    plain = torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)
    error = (plain - plain.mean(dim=0)).square().sum() / plain.square().sum()
    return bool(error.sqrt() < _PROBE_ERROR)


def _vllm_tables(
    model: HFModel, parameters: dict[str, Any], is_neox: bool, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, float32 [positions, rotary_dim / 2]."""
    logging.getLogger("vllm").setLevel(logging.ERROR)
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    with set_current_vllm_config(VllmConfig()):
        rope = get_rope(
            model.geometry.head_dim,
            max_position=model.positions,
            is_neox_style=is_neox,
            rope_parameters=parameters,
            dtype=dtype,
        )
    cos, sin = rope.cos_sin_cache.float().chunk(2, dim=-1)
    return cos.contiguous(), sin.contiguous()
