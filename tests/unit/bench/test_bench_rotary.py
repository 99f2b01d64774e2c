# SPDX-License-Identifier: Apache-2.0
"""vLLM's rotary tables against what a model does to its keys."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from lynx_connector.bench.hf_model import HFModel
from lynx_connector.bench.rotary import model_rotary, undoes_rotation

ROPES = {
    "plain": {"rope_type": "default", "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 50000.0, "factor": 4.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 256,
    },
    "yarn": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
}  # fmt: skip


@pytest.fixture
def with_rope(model_folder, tmp_path):
    """The tiny model under another rotary embedding."""

    def make(parameters: dict) -> Path:
        folder = shutil.copytree(model_folder, tmp_path / "model")
        config = json.loads((folder / "config.json").read_text())
        config.pop("rope_theta")
        config["rope_parameters"] = parameters
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ROPES)
def test_the_tables_undo_the_models_rotation(with_rope, kind, dtype):
    rotary = model_rotary(HFModel(with_rope(ROPES[kind]), dtype))
    assert rotary is not None and rotary.is_neox
    assert rotary.cos.shape == rotary.sin.shape
    assert rotary.cos.shape[1] == 32


def test_other_tables_do_not(model_folder):
    model = HFModel(model_folder, "float32")
    keys = model.prefill([5] * 256)[:, 0, 0]
    position = torch.arange(256)[:, None]
    for theta, is_neox, expected in ((1e4, True, True), (1e4, False, False), (2e4, True, False)):
        angle = position / theta ** (torch.arange(32) / 32)
        assert undoes_rotation(angle.cos(), angle.sin(), is_neox, keys) is expected


def test_several_embeddings_in_one_model_are_not_undone(model_folder):
    model = HFModel(model_folder, "float32")
    model.config.rope_parameters = {"full_attention": ROPES["plain"]}
    assert model_rotary(model) is None
