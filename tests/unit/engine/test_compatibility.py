# SPDX-License-Identifier: Apache-2.0
"""What makes two instances incompatible: any setting that changes the KV of a prompt, no other."""

import json
import re
import shutil
import struct
from types import SimpleNamespace

import pytest
from vllm.config import ModelConfig

from lynx_connector.config import LynxConfig
from lynx_connector.engine import served
from lynx_connector.wire import messages
from lynx_connector.wire.identity import difference

GEOMETRY = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 64, "dtype": "bfloat16"}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "dtype": "bfloat16",
}


def safetensors(path, fill=0, size=4096):
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}})
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes([fill]) * size)


def make_model(folder, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA | changes))
    safetensors(folder / "model.safetensors")
    return folder


@pytest.fixture
def model(tmp_path):
    return make_model(tmp_path / "model")


def compat(folder, *, tp=1, geometry=GEOMETRY, load_format="auto", lynx=None, **flags):
    """Of an instance started with these flags of vLLM."""
    config = ModelConfig(model=str(folder), skip_tokenizer_init=True, **flags)
    vllm_config = SimpleNamespace(
        model_config=config,
        parallel_config=SimpleNamespace(tensor_parallel_size=tp),
        load_config=SimpleNamespace(load_format=load_format),
    )
    return served.compatibility(vllm_config, LynxConfig(**lynx or {}), geometry)


OTHER_CONFIGURATIONS = [
    {"hf_overrides": {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}},
    {"hf_overrides": {"rope_parameters": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096,
        "rope_theta": 10000.0}}},
    {"hf_overrides": {"rope_theta": 5e5}},
    {"hf_overrides": {"num_attention_heads": 4}},
    {"hf_overrides": {"rms_norm_eps": 1e-3}},
    {"hf_overrides": lambda config: config.update({"attention_bias": True}) or config},
    {"dtype": "float32"},
    {"quantization": "fp8"},
    {"load_format": "dummy"},
]  # fmt: skip


def label(flags):
    """The same in every process: workers of one run compare what they collect."""
    return re.sub(r" at 0x\w+", "", str(flags))


@pytest.mark.parametrize("flags", OTHER_CONFIGURATIONS, ids=label)
@pytest.mark.parametrize("lynx", [None, {"model_id": "same"}], ids=["files", "model_id"])
def test_what_changes_the_kv_is_another_configuration(model, flags, lynx):
    """`model_id` names the weights, and hides nothing else."""
    told = difference(compat(model, lynx=lynx), compat(model, lynx=lynx, **flags))
    assert told.startswith("another model configuration")
    assert "--hf-overrides" in told and "weights" not in told and "cache" not in told


@pytest.mark.parametrize("flags", [
    {"max_model_len": 512},
    {"seed": 7},
    {"served_model_name": "other"},
    {"hf_overrides": {}},
    {"hf_overrides": {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}},
    {"dtype": "bfloat16"},
    {"enforce_eager": True},
    {"max_logprobs": 3},
    {"generation_config": "vllm"},
    {"logits_processors": ["some:thing"]},
    {"trust_remote_code": True},
], ids=str)  # fmt: skip
def test_what_does_not_is_not(model, flags):
    assert compat(model) == compat(model, **flags)


def test_a_copy_elsewhere_is_the_same(model, tmp_path):
    copy = shutil.copytree(model, tmp_path / "elsewhere" / "copy")
    assert compat(model) == compat(copy)
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    (copy / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    (copy / "README.md").write_text("hello")
    (copy / ".cache").mkdir()
    assert compat(model) == compat(copy)


def test_a_config_file_that_only_looks_different_is_the_same(model, tmp_path):
    """Saved by another version of transformers."""
    copy = make_model(
        tmp_path / "copy", transformers_version="4.1", torch_dtype="bfloat16", use_cache=False,
        bos_token_id=5, initializer_range=1.0,
    )  # fmt: skip
    assert compat(model) == compat(copy)


def test_rope_in_the_file_is_the_same_as_rope_by_a_flag(model, tmp_path):
    written = make_model(tmp_path / "written", rope_theta=5e5)
    flag = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
    assert compat(written) == compat(model, hf_overrides=flag)
    assert compat(written) != compat(model)


@pytest.mark.parametrize("name", [
    "model.safetensors", "pytorch_model.bin", "consolidated.00.pt", "weights.pth", "model.gguf",
    "model.tensors",
])  # fmt: skip
def test_weights_of_any_kind_count(model, tmp_path, name):
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(bytes(1 << 20))
    copy = shutil.copytree(model, tmp_path / "copy")
    assert compat(model) == compat(copy)
    for at in (0, (1 << 20) - 1):
        data = bytearray(1 << 20)
        data[at] = 1
        (copy / name).write_bytes(data)
        assert difference(compat(model), compat(copy)).startswith("another model (its weights")
    (copy / name).write_bytes(bytes((1 << 20) + 1))
    assert compat(model) != compat(copy)


def test_an_edit_of_one_layer_amid_a_large_file_is_seen(model, tmp_path):
    size = 100 << 20
    with (model / "model.safetensors").open("wb") as file:
        file.truncate(size)  # sparse
    copy = shutil.copytree(model, tmp_path / "copy")
    with (copy / "model.safetensors").open("r+b") as file:
        file.truncate(size)
        file.seek(40 << 20)
        file.write(b"\x01" * (16 << 20))  # a matrix of 4096 x 2048 in bfloat16
    assert compat(model) != compat(copy)


def test_another_index_of_shards_counts(model, tmp_path):
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "1"}}')
    copy = shutil.copytree(model, tmp_path / "copy")
    (copy / "model.safetensors.index.json").write_text('{"weight_map": {"a": "2"}}')
    assert compat(model) != compat(copy)


def test_files_that_vllm_would_not_load_do_not_count(model, tmp_path):
    copy = shutil.copytree(model, tmp_path / "copy")
    (copy / "pytorch_model.bin").write_bytes(b"old")
    (copy / "optimizer.pt").write_bytes(b"x")
    assert compat(model) == compat(copy)


def test_code_of_the_model_counts_where_it_is_trusted(model, tmp_path):
    (model / "modeling_x.py").write_text("a = 1")
    copy = shutil.copytree(model, tmp_path / "copy")
    (copy / "modeling_x.py").write_text("a = 2")
    assert compat(model) == compat(copy)
    assert compat(model, trust_remote_code=True) != compat(copy, trust_remote_code=True)


def test_model_id_stands_for_the_weights(model, tmp_path):
    other = make_model(tmp_path / "other")
    safetensors(other / "model.safetensors", fill=1)
    assert compat(model) != compat(other)
    same = {"model_id": "one"}
    assert compat(model, lynx=same) == compat(other, lynx=same)
    assert difference(compat(model, lynx=same), compat(model)).startswith("another model (")


@pytest.mark.parametrize(
    "flags",
    [{"tp": 2}, {"geometry": GEOMETRY | {"dtype": "float32"}},
     {"geometry": GEOMETRY | {"num_layers": 4}}],
    ids=str,
)  # fmt: skip
def test_cache_and_parallelism_are_named(model, flags):
    assert difference(compat(model), compat(model, **flags)).startswith("another cache dtype")


def test_longrope_is_the_one_place_where_the_length_matters(tmp_path):
    factors = {"short_factor": [1.0] * 32, "long_factor": [2.0] * 32}
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 1024, **factors}
    model = make_model(
        tmp_path / "phi", rope_parameters=rope | {"rope_theta": 1e4},
        original_max_position_embeddings=1024,
    )  # fmt: skip
    short, shorter, long = (compat(model, max_model_len=n) for n in (1024, 512, 2048))
    assert short == shorter != long


def test_a_refusal_fits_its_message_and_what_a_peer_says_is_not_repeated(model):
    one, two = compat(model), compat(model, tp=2, dtype="float32", lynx={"model_id": "x"})
    told = difference(one, two)
    assert told.count(";") == 2
    assert len("peer has " + told) <= messages.MAX_CAUSE
    assert len(one) <= 256
    for strange in ("", "x" * 256, "model:\x00|config:|cache:", one + "\n", one.upper()):
        told = difference(one, strange)
        assert "another model, cache dtype" in told and told.isprintable() and len(told) < 200


def test_a_file_that_cannot_be_read_is_named(model, monkeypatch):
    from pathlib import Path

    from lynx_connector.errors import ConfigError

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    config = ModelConfig(model=str(model), skip_tokenizer_init=True)
    monkeypatch.setattr(Path, "open", refuse)
    vllm_config = SimpleNamespace(
        model_config=config,
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        load_config=SimpleNamespace(load_format="auto"),
    )
    with pytest.raises(ConfigError, match=r"Permission denied.*model_id"):
        served.compatibility(vllm_config, LynxConfig(), GEOMETRY)


def test_the_tables_folder_is_what_calibrate_can_know(model):
    from lynx_connector.wire.identity import tables_key

    def key(**flags):
        config = ModelConfig(model=str(model), skip_tokenizer_init=True, **flags)
        vllm_config = SimpleNamespace(
            model_config=config, parallel_config=SimpleNamespace(tensor_parallel_size=1)
        )
        return served.tables_key(vllm_config, LynxConfig(), GEOMETRY)

    plain = tables_key(str(model), 1, GEOMETRY)
    assert key() == key(max_model_len=512) == plain
    overrides = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
    assert key(hf_overrides=overrides) != plain
