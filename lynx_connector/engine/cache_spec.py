# SPDX-License-Identifier: Apache-2.0
"""Which kinds of KV cache Lynx can move: those that keep every token of a request in a block of
its own, K beside V, in a dtype that the codecs know. Others are refused by name.

Kinds and their fields: vllm/v1/kv_cache_interface.py.
"""

from typing import Any

from lynx_connector.codec.types import DTYPES
from lynx_connector.errors import ConfigError

NULL_BLOCK = 0
"""vLLM's block that stands where a request has none (v1/core/block_pool.py, `null_block`)."""

_ANOTHER = "use another connector for this model"

_REFUSED = {
    "SlidingWindow": (
        "gives blocks back that leave its sliding window",
        "set --disable-sliding-window on both sides (it limits the context to the window)",
    ),
    "ChunkedLocalAttention": ("gives blocks back that leave its attention chunk", _ANOTHER),
    "RSWA": ("gives blocks back that leave its window", _ANOTHER),
    "CircularBuffer": ("writes over blocks that leave its window", _ANOTHER),
    "MLA": ("has a latent vector in place of K and V (MLA)", _ANOTHER),
    "Mamba": ("has a state in place of tokens (Mamba, linear attention)", _ANOTHER),
    "CrossAttention": ("holds the keys of an encoder", _ANOTHER),
    "EncoderOnly": ("has no KV cache to move", _ANOTHER),
    "UniformType": ("differs between layers in heads or head size", _ANOTHER),
}
"""Part of the kind's name -> what such a layer does, and the remedy; the first that fits."""


def check_cache_spec(spec: Any) -> None:
    """Refuse a KV cache spec whose blocks Lynx would misread or write where it must not.

    Raises:
        ConfigError: naming the kind of layer and the remedy.
    """
    kind = type(spec).__name__
    if kind != "FullAttentionSpec":  # its subclasses add rules of their own
        why, remedy = next(
            (text for part, text in _REFUSED.items() if part in kind),
            ("is of a kind that this version does not know", _ANOTHER),
        )
        raise ConfigError(
            f"the model's attention {why}; LynxConnector moves full attention only "
            f"(KV cache kind {kind}): {remedy}"
        )
    dtype = str(spec.dtype).rsplit(".")[-1]
    quantized = getattr(spec, "kv_quant_mode", None)
    if dtype not in DTYPES or quantized:
        raise ConfigError(
            f"KV cache dtype {dtype}{f' ({quantized.name})' if quantized else ''}: LynxConnector "
            f"supports {', '.join(DTYPES)}; set --kv-cache-dtype auto"
        )
    if spec.head_size_v != spec.head_size:
        raise ConfigError(
            f"the model's V has {spec.head_size_v} elements a head and K {spec.head_size}; "
            f"LynxConnector needs them equal: {_ANOTHER}"
        )
