# SPDX-License-Identifier: Apache-2.0
"""KV extraction against transformers' own answers."""

from __future__ import annotations

import pytest
import torch

from lynx_connector.bench.errors import BenchError
from lynx_connector.bench.hf_model import HFModel, make_past
from lynx_connector.bench.methods import paged_cache, paged_values
from lynx_connector.bench.texts import QUESTIONS, build_prompts


@pytest.fixture(scope="module")
def model(model_folder) -> HFModel:
    return HFModel(model_folder, "float32")


def test_geometry(model):
    g = model.geometry
    assert (g.num_layers, g.num_kv_heads, g.head_dim, g.dtype) == (2, 2, 64, "float32")


def test_an_answer_on_the_extracted_cache_is_the_models_own(model):
    ids = list(range(2, 60))
    values = model.prefill(ids[:-1])
    assert values.shape == (57, 2, 2, 2, 64)
    past = make_past(values, room=16)
    tokens = model.greedy(past, ids[-1], 16)
    own = model.model.generate(
        torch.tensor([ids]), max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert tokens == own[0, len(ids) :].tolist()
    logits = model.logits(past, [ids[-1], *tokens[:-1]])
    assert logits.argmax(dim=-1).tolist() == tokens


def test_a_prefix_can_be_shared(model):
    ids = list(range(2, 60))
    whole = model.prefill(ids)
    prefix = model.prefill(ids[:40])
    tail = model.prefill(ids[40:], prefix)
    torch.testing.assert_close(torch.cat((prefix, tail)), whole, rtol=1e-4, atol=1e-4)


def test_values_are_rounded_to_the_caches_dtype(model_folder):
    values = HFModel(model_folder, "bfloat16").prefill([2, 3, 4])
    assert values.dtype == torch.bfloat16


@pytest.mark.parametrize("tokens", [0, 1, 16, 33])
def test_paged_cache_round_trip(tokens):
    values = torch.randn(tokens, 3, 2, 2, 8).bfloat16()
    cache = paged_cache(values)
    assert torch.equal(paged_values(cache, tokens), values)
    slots = torch.arange(tokens).numpy()
    gathered = [cache.gather(layer, slots) for layer in range(3)]
    assert torch.equal(torch.stack(gathered, dim=1), values)


def test_prompts_share_all_but_the_question(model, make_text):
    text = build_prompts(model.tokenizer, make_text("a.txt"), 300, 3)
    assert len(text.prompts) == 3
    assert len({tuple(ids[: text.prefix]) for ids in text.prompts}) == 1
    assert len({ids[text.prefix] for ids in text.prompts}) > 1
    assert text.prefix >= 290
    assert QUESTIONS[2] in model.tokenizer.decode(text.prompts[2])


def test_a_single_prompt_leaves_its_last_token_to_the_decode_instance(model, make_text):
    text = build_prompts(model.tokenizer, make_text("a.txt"), 300, 1)
    assert text.prefix == len(text.prompts[0]) - 1


def test_a_prompt_beyond_the_models_positions_is_refused(model):
    with pytest.raises(BenchError, match=r"1025 tokens.*1024 positions"):
        model.check_length(1025)


def test_a_folder_that_is_no_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(BenchError, match=str(tmp_path)):
        HFModel(tmp_path)
