# SPDX-License-Identifier: Apache-2.0
"""The soak's model: the scheduler tests' tiny Llama with room for long chats, and two adapters."""

import json
from pathlib import Path

from tests.scheduler import tiny_llama

MAX_MODEL_LEN = 4096
VOCABULARY = tiny_llama.VOCABULARY
ADAPTERS = ("adapter-a", "adapter-b")

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] }}: {{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}a: {% endif %}"
)


def write(folder: Path) -> Path:
    """Write model, tokenizer and adapters into `folder`; returns it."""
    tiny_llama.write(folder)
    _change(folder / "config.json", max_position_embeddings=MAX_MODEL_LEN)
    _change(
        folder / "tokenizer_config.json",
        model_max_length=MAX_MODEL_LEN,
        chat_template=CHAT_TEMPLATE,
    )
    for seed, name in enumerate(ADAPTERS):
        _write_adapter(folder / name, seed)
    return folder


def adapter_arguments(folder: Path) -> list[str]:
    """What vLLM needs to serve both adapters of the model in `folder` beside it."""
    modules = [f"{name}={folder / name}" for name in ADAPTERS]
    return ["--enable-lora", "--max-loras", "2", "--max-lora-rank", "8", "--lora-modules", *modules]


def _change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def _write_adapter(folder: Path, seed: int) -> None:
    import torch
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    rank, config = 8, tiny_llama.CONFIG
    targets = {
        "q_proj": config["num_attention_heads"] * config["head_dim"],
        "v_proj": config["num_key_value_heads"] * config["head_dim"],
    }
    generator = torch.Generator().manual_seed(1000 + seed)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for module, rows in targets.items():
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            inner = torch.randn(rank, config["hidden_size"], generator=generator)
            outer = torch.randn(rows, rank, generator=generator)
            tensors[f"{name}.lora_A.weight"] = inner / config["hidden_size"] ** 0.5
            tensors[f"{name}.lora_B.weight"] = outer / rank**0.5
    save_file(tensors, folder / "adapter_model.safetensors")
    adapter = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(targets),
    }
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
