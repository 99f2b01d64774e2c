# SPDX-License-Identifier: Apache-2.0
"""`lynx plan` as a user runs it."""

import json

import pytest
from typer.testing import CliRunner

from lynx_connector.cli import app

SMOLLM = ["--layers", "30", "--kv-heads", "3", "--head-dim", "64"]


def plan(*arguments):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def test_dimensions_give_table_picture_and_json(tmp_path):
    out, png = tmp_path / "o.json", tmp_path / "o.png"
    done = plan(*SMOLLM, "--tokens", 1000, "--tokens", 4096, "--json", out, "--png", png)
    assert done.exit_code == 0, done.output
    report = json.loads(out.read_text())
    assert report["kv_bytes_per_token"] == 23040
    assert {row["tokens"] for row in report["rows"]} == {1000, 4096}
    assert {"bf16", "int8", "int4", "lynx"} <= {row["mode"] for row in report["rows"]}
    assert report["crossings"][-1]["best"][-1]["mode"] == "bf16"
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "soonest token 32 at 4096 tokens" in done.output


def test_a_model_folder_is_read_from_its_config(tmp_path):
    config = {
        "model_type": "llama",
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "hidden_size": 576,
        "dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    out = tmp_path / "o.json"
    assert plan(tmp_path, "--json", out).exit_code == 0
    assert json.loads(out.read_text())["kv_bytes_per_token"] == 23040
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 4}))
    wrong = plan(tmp_path)
    assert (wrong.exit_code, "num_attention_heads = 9" in wrong.output) == (2, True)


def test_paper_preset_shows_both(tmp_path):
    out = tmp_path / "o.json"
    assert plan("--paper", "--json", out).exit_code == 0
    rows = {row["mode"]: row for row in json.loads(out.read_text())["rows"]}
    assert rows["Lynx"]["published_ttft_s"] == 1.6
    assert [name for name, row in rows.items() if row["fitted"]] == ["BF16", "INT8"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--step-ms", "0"], "step_ms = 0"),
        (["--step-ms", "nan"], "step_ms = nan"),
        (["--link-mbit", "-5"], "link_mbit = -5"),
        (["--tokens", "0"], "tokens = 0"),
        (["--prefill-tokens-s", "0"], "prefill_tokens_s = 0"),
        (["--chunk-tokens", "0"], "chunk_tokens = 0"),
        (["--token", "0"], "token = 0"),
        (["--tensor-parallel-size", "2"], "tensor_parallel_size = 2"),
        (["--layers", "0"], "layers = 0"),
        (["--codec", "zip"], "codec = 'zip'"),
        (["--codec", "hadamard", "--anchor-bits", "3"], "anchor_bits = 3"),
        (["--dtype", "int3"], "dtype = 'int3'"),
    ],
)
def test_impossible_input_is_named(arguments, named):
    done = plan(*SMOLLM, *arguments)
    assert done.exit_code == 2
    assert named in done.output


def test_half_a_model_is_refused():
    done = plan("--layers", 3)
    assert done.exit_code == 2
    assert "--kv-heads, --head-dim" in done.output


def test_a_folder_without_a_model_is_named(tmp_path):
    done = plan(tmp_path)
    assert (done.exit_code, str(tmp_path) in done.output.replace("\n", "")) == (2, True)
