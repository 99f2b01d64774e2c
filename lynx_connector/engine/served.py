# SPDX-License-Identifier: Apache-2.0
"""What this instance serves, as far as the KV of a prompt depends on it.

The configuration is the one that vLLM has computed: config.json with --hf-overrides, rope
settings, quantization and dtype applied. `--max-model-len`, chat template, tokenizer, backend,
parallelism of data and block size do not belong to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lynx_connector.config import LynxConfig
from lynx_connector.wire import identity

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def compatibility(vllm_config: VllmConfig, config: LynxConfig, geometry: Mapping[str, Any]) -> str:
    """`identity.compatibility` of this worker. `model_id` stands for the weights alone.

    Raises:
        ConfigError: a file of the model cannot be read.
    """
    model = vllm_config.model_config
    name = getattr(model, "model_weights", "") or model.model  # object storage: model is a copy
    weights = identity.model_identity(
        name,
        getattr(model.revision, "resolved", None) or model.revision,
        config.model_id,
        code=model.trust_remote_code,
    )
    cache = {
        "tensor_parallel_size": vllm_config.parallel_config.tensor_parallel_size,
        "geometry": geometry,
    }
    return identity.compatibility(weights, effective_config(vllm_config), cache)


def tables_key(vllm_config: VllmConfig, config: LynxConfig, geometry: Mapping[str, Any]) -> str:
    """`identity.tables_key` of this worker."""
    model = vllm_config.model_config
    overrides = model.hf_overrides
    return identity.tables_key(
        model.model,
        vllm_config.parallel_config.tensor_parallel_size,
        geometry,
        revision=model.revision,
        model_id=config.model_id,
        overrides=overrides if isinstance(overrides, Mapping) else {"function": overrides},
    )


def effective_config(vllm_config: VllmConfig) -> dict[str, Any]:
    """Everything but weights and cache shape that the KV of a prompt depends on."""
    model = vllm_config.model_config
    text = model.hf_text_config
    found = {
        "config": identity.hf_config(_as_dict(model.hf_config)),
        "text": identity.hf_config(_as_dict(text)) if text is not model.hf_config else None,
        "dtype": str(model.dtype),
        "quantization": model.quantization,
        "quantization_config": _as_dict(model.quantization_config),
        "classes": getattr(model, "model_class_overrides", None) or None,
        "code_revision": model.code_revision,
        "long_rope": _long_rope(text, model.max_model_len),
    }
    load = vllm_config.load_config
    if load.load_format == "dummy":
        found["dummy_weights"] = model.seed
    return found


def _long_rope(text: Any, max_model_len: int) -> bool | None:
    """The one place where K depends on --max-model-len: LongRoPE has two sets of factors, and vLLM
    takes the long ones if the limit exceeds the original one (phi3_long_rope_scaled_rope.py)."""
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)
    if not isinstance(rope, Mapping):
        return None
    kinds = (rope, *(value for value in rope.values() if isinstance(value, Mapping)))
    for kind in kinds:
        if kind.get("rope_type", kind.get("type")) == "longrope":
            original = kind.get("original_max_position_embeddings") or getattr(
                text, "original_max_position_embeddings", None
            )
            return original is None or max_model_len > original
    return None


def _as_dict(value: Any) -> Any:
    """A configuration object as a dict; None for None."""
    for method in ("to_dict", "model_dump"):
        if callable(convert := getattr(value, method, None)):
            return convert()
    return value if value is None or isinstance(value, Mapping) else vars(value)
