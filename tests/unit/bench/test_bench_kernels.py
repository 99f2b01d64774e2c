# SPDX-License-Identifier: Apache-2.0
"""`lynx bench kernels`: the report's form, its arithmetic, and what it refuses."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from lynx_connector.bench.kernels import runner
from lynx_connector.bench.kernels.caches import workload
from lynx_connector.bench.kernels.ops import Op, make_ops
from lynx_connector.cli import app


def lynx(*arguments: str):
    return CliRunner().invoke(app, ["bench", "kernels", *arguments])


@pytest.fixture(autouse=True)
def small(monkeypatch) -> None:
    """Less work, and this process's own thread counts back at the end."""
    monkeypatch.setattr(runner, "ROUNDS", 2)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures the CPU kernels")
def test_the_report_has_every_operation_of_every_codec(tmp_path) -> None:
    out = tmp_path / "out.json"
    result = lynx("--tokens", "8", "--head-dim", "16", "--json", str(out))
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    assert set(report) == {"device", "copy_gb_s", "rows"}
    assert report["copy_gb_s"] > 0
    two_tiers = {"encode", "decode", "patch", "exact encode", "exact decode"}
    for codec, ops in {
        "klt": two_tiers,
        "hadamard": two_tiers,
        "bf16": {"encode", "decode"},
        "int8": {"encode", "decode"},
        "int4": {"encode", "decode"},
    }.items():
        assert {row["op"] for row in report["rows"] if row["codec"] == codec} == ops
    for row in report["rows"]:
        assert row["dtype"] == "bfloat16" and row["head_dim"] == 16
        assert row["ns_per_element"] * row["gb_s"] == pytest.approx(2)  # bytes an element
        assert row["copy_ratio"] > 0


def test_rates_are_medians_over_the_same_kv(monkeypatch) -> None:
    load = workload(16, "float32", 8, "cpu")
    pauses = iter([0.0, 0.03, 0.0])  # the first is the warm-up's, outside the rounds
    op = Op("encode", "x", lambda: time.sleep(0.01), lambda: time.sleep(next(pauses, 0)))
    monkeypatch.setattr(runner, "make_ops", lambda codec, load: [op])
    copy, (row,) = runner.measure_one("x", load)
    assert row["ns_per_element"] * load.elements / 1e9 == pytest.approx(0.01, rel=0.3)
    assert row["gb_s"] / copy == pytest.approx(row["copy_ratio"])


def test_a_workload_is_one_prompt_in_shuffled_blocks() -> None:
    load = workload(16, "float16", 300, "cpu")
    assert len(np.unique(load.slots)) == 300
    block, offset = np.divmod(load.slots, 128)
    assert (offset == np.arange(300) % 128).all()
    assert sorted(set(block.tolist())) == [0, 1, 2] and block[0] != 0
    assert load.num_bytes == 300 * 16 * 2 * 8 * 16 * 2


def test_operations_do_what_they_say() -> None:
    load = workload(64, "bfloat16", 20, "cpu")
    for op in make_ops("hadamard", load):
        op.prepare()
        op.run()
    for layer in range(load.cache.num_layers):  # "exact decode" came last
        same = load.refined.gather(layer, load.slots) == load.cache.gather(layer, load.slots)
        assert same.all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--codec", "zip"), "unknown codec 'zip'; known codecs: klt"),
        (("--head-dim", "20"), "--head-dim 20 is not a multiple of 8"),
        (("--dtype", "fp8"), "--dtype 'fp8' is not one of bfloat16"),
        (("--json", "/nowhere/out.json"), "/nowhere/out.json: no such folder"),
        (("--tokens", "0"), "'--tokens'"),
    ],
)
def test_bad_input_is_named(arguments, message) -> None:
    result = lynx(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
