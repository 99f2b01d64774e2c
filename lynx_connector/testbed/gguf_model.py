# SPDX-License-Identifier: Apache-2.0
"""Convert a Llama in GGUF form into the Hugging Face form that vLLM loads.

Only what the demo's model needs: architecture "llama", any quantisation that the `gguf`
package can undo, byte-level BPE vocabulary. Weights are written as bfloat16 safetensors.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file

_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.weight")


def convert(gguf_file: Path, folder: Path) -> None:
    """Write config, weights and tokenizer of `gguf_file` into the existing `folder`.

    Raises:
        ValueError: the file is not a Llama or holds a tensor that a Llama does not have.
    """
    reader = GGUFReader(gguf_file)
    config = _config(reader)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        if block := _BLOCK.fullmatch(tensor.name):
            layer, part = block.groups()
            if part not in _BLOCK_NAMES:
                raise ValueError(f"{gguf_file.name}: tensor {tensor.name!r} is not part of a Llama")
            name = f"model.layers.{layer}.{_BLOCK_NAMES[part]}.weight"
            if part in heads:
                values = _undo_rope_permutation(values, heads[part])
        elif tensor.name in _TOP_NAMES:
            name = _TOP_NAMES[tensor.name]
        else:
            raise ValueError(f"{gguf_file.name}: tensor {tensor.name!r} is not part of a Llama")
        weights[name] = torch.tensor(values).to(torch.bfloat16)
    config["tie_word_embeddings"] = "lm_head.weight" not in weights
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    _write_tokenizer(gguf_file, folder, reader)


def _field(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise ValueError(f"GGUF metadata lacks {key!r}")
    return field.contents()


def _config(reader: GGUFReader) -> dict[str, Any]:
    architecture = _field(reader, "general.architecture")
    if architecture != "llama":
        raise ValueError(f"GGUF architecture is {architecture!r}, expected 'llama'")
    heads = _field(reader, "llama.attention.head_count")
    hidden = _field(reader, "llama.embedding_length")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": _field(reader, "llama.feed_forward_length"),
        "num_hidden_layers": _field(reader, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _field(reader, "llama.attention.head_count_kv"),
        "head_dim": hidden // heads,
        "vocab_size": _field(reader, "llama.vocab_size"),
        "max_position_embeddings": _field(reader, "llama.context_length"),
        "rope_theta": _field(reader, "llama.rope.freq_base"),
        # GGUF keeps it as float32; seven digits give back the number that was meant.
        "rms_norm_eps": float(f"{_field(reader, 'llama.attention.layer_norm_rms_epsilon'):.7g}"),
        "bos_token_id": _field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _field(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _field(reader, "tokenizer.ggml.padding_token_id"),
        "dtype": "bfloat16",
    }


def _undo_rope_permutation(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's interleaving of rotary rows: [heads, dim/2, 2] to [heads, 2, dim/2]."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2)
    return halves.reshape(rows, columns)


def _write_tokenizer(gguf_file: Path, folder: Path, reader: GGUFReader) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    tokenizer.chat_template = _field(reader, "tokenizer.chat_template")
    tokenizer.save_pretrained(folder)
