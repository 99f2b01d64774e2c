# SPDX-License-Identifier: Apache-2.0
"""`lynx bench codec` from the command line to the report, with a tiny random model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from lynx_connector.bench.rows import ROWS
from lynx_connector.cli import app

KEYS = {
    "codec", "anchor_bits", "total_bits", "vnmse_k_anchor", "vnmse_v_anchor", "vnmse_k", "vnmse_v",
    "kl", "accepted24", "accepted64", "full24", "refined_agree64",
}  # fmt: skip


@pytest.fixture
def bench(tmp_path, model_folder) -> Callable[..., Result]:
    """Run the command; options may be overridden by later ones."""

    def run(*texts: Path, options: tuple[str, ...] = (), model: Path = model_folder) -> Result:
        arguments = ["bench", "codec", "--model", str(model), "--json", str(tmp_path / "out.json")]
        arguments += [part for text in texts for part in ("--text", str(text))]
        return CliRunner().invoke(app, [*arguments, "--prompt-tokens", "300", *options])

    return run


@pytest.fixture(scope="module")
def report(tmp_path_factory, model_folder, make_text) -> dict[str, Any]:
    """All rows on two texts with two starts each."""
    out = tmp_path_factory.mktemp("out")
    arguments = ["bench", "codec", "--model", str(model_folder), "--json", str(out / "out.json")]
    arguments += ["--text", str(make_text("one.txt")), str(make_text("two.txt"))]
    arguments += ["--prompt-tokens", "300", "--starts", "2", "--png", str(out / "out.png")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "two folds" in result.output
    assert (out / "out.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((out / "out.json").read_text())


def row(report: dict[str, Any], codec: str) -> dict[str, Any]:
    (found,) = [row for row in report["rows"] if row["codec"] == codec]
    return found


def test_report_has_the_agreed_keys(report):
    assert set(report) == {"model", "texts", "starts", "rows"}
    assert report["model"] == "tiny-llama"
    assert report["texts"] == ["one.txt", "two.txt"]
    assert report["starts"] == 4
    assert [entry["codec"] for entry in report["rows"]] == list(ROWS)
    for entry in report["rows"]:
        extra = {"exact_mismatches"} if entry["codec"].endswith("+exact") else set()
        assert set(entry) == KEYS | extra


def test_figures_hang_together(report):
    for entry in report["rows"]:
        assert 0 <= entry["accepted24"] <= min(24, entry["accepted64"]) + 1e-9
        assert entry["accepted64"] <= 64 and entry["refined_agree64"] <= 64
        assert 0 <= entry["full24"] <= 1
        assert entry["anchor_bits"] <= entry["total_bits"]
        assert entry["vnmse_k"] <= entry["vnmse_k_anchor"]
        assert entry["vnmse_v"] <= entry["vnmse_v_anchor"]
        assert entry["kl"] >= 0


def test_the_uncompressed_cache_is_the_reference(report):
    entry = row(report, "bf16")
    assert entry["anchor_bits"] == entry["total_bits"] == 16
    assert entry["kl"] == pytest.approx(0, abs=1e-6)
    assert entry["vnmse_k"] == entry["vnmse_v"] == 0
    assert (entry["accepted24"], entry["accepted64"], entry["full24"]) == (24, 64, 1)


def test_bits_count_scales_and_exact_tokens(report):
    """By hand: T = prompt tokens, 17 of them exact; scales 1/8 bit (hadamard), 1/4 bit (int8)."""
    for codec, bits in (("hadamard", 8.125), ("int8", 8.25)):
        found = row(report, codec)["total_bits"]
        # (T * bits + 17 * (16 - bits)) / T with T a little above 300.
        assert bits + 17 * (16 - bits) / 360 < found < bits + 17 * (16 - bits) / 300
    assert row(report, "hadamard")["anchor_bits"] < 4.9


def test_the_better_codec_looks_better(report):
    assert row(report, "int8")["kl"] < row(report, "hadamard")["kl"] < row(report, "int4")["kl"]
    assert row(report, "hadamard")["vnmse_k_anchor"] == pytest.approx(7e-3, rel=0.3)


def test_klt_with_more_bits_looks_better(report):
    three, four, five = (row(report, name) for name in ("klt-3bit", "klt", "klt-5bit"))
    assert three["anchor_bits"] < four["anchor_bits"] < five["anchor_bits"]
    assert three["vnmse_v_anchor"] > four["vnmse_v_anchor"] > five["vnmse_v_anchor"]
    assert four["total_bits"] < 8.9


def test_the_exact_tier_leaves_no_difference(report):
    entry = row(report, "klt+exact")
    assert entry["exact_mismatches"] == 0
    assert entry["refined_agree64"] == 64
    assert entry["vnmse_k"] == entry["vnmse_v"] == 0 or entry["total_bits"] < 16
    assert entry["anchor_bits"] == row(report, "klt")["anchor_bits"]


def test_rows_can_be_chosen(bench, make_text, tmp_path):
    options = ("--codec", "int4", "--codec", "bf16", "--starts", "1", "--dtype", "float16")
    result = bench(make_text("one.txt"), options=options)
    assert result.exit_code == 0, result.output
    assert "two folds" not in result.output
    report = json.loads((tmp_path / "out.json").read_text())
    assert [entry["codec"] for entry in report["rows"]] == ["bf16", "int4"]
    assert report["starts"] == 1


def refused(result: Result) -> str:
    """The one line of an error, with exit status 2."""
    assert result.exit_code == 2, result.output
    (line,) = result.output.strip().splitlines()
    assert line.startswith("lynx bench codec: ")
    return line


def test_a_short_text_is_named_with_its_length(bench, make_text):
    line = refused(bench(make_text("short.txt", 20), options=("--codec", "int4")))
    assert "short.txt has" in line and "shorter than a prompt" in line and "256" in line


def test_a_text_shorter_than_asked_for_is_used_whole(bench, make_text):
    options = ("--codec", "bf16", "--starts", "1", "--prompt-tokens", "900")
    result = bench(make_text("middle.txt", 110), options=options)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("content", ["", " \n\n"])
def test_an_empty_text(bench, tmp_path, content):
    (tmp_path / "empty.txt").write_text(content)
    assert "empty.txt is empty" in refused(bench(tmp_path / "empty.txt"))


def test_a_text_that_cannot_be_read(bench, tmp_path):
    assert "No such file" in refused(bench(tmp_path / "absent.txt"))
    assert "Is a directory" in refused(bench(tmp_path))


def test_a_folder_without_model(bench, make_text, tmp_path):
    text = make_text("one.txt")
    assert "no config.json" in refused(bench(text, text, model=tmp_path))
    assert "no such folder" in refused(bench(text, text, model=tmp_path / "absent"))


def test_unknown_codecs_are_named(bench, make_text):
    line = refused(bench(make_text("one.txt"), options=("--codec", "klt-4bit")))
    assert "did you mean klt" in line and "hadamard" in line


def test_klt_needs_two_texts(bench, make_text):
    line = refused(bench(make_text("one.txt"), options=("--codec", "klt")))
    assert "at least 2 texts" in line


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--starts", "0"), "--starts 0"),
        (("--starts", "99"), "--starts 99"),
        (("--dtype", "fp8"), "--dtype fp8"),
        (("--prompt-tokens", "1000"), "1024 positions"),
        (("--png", "/absent/out.png"), "/absent/out.png"),
    ],
)
def test_other_bad_options(bench, make_text, options, named):
    line = refused(bench(make_text("one.txt"), options=("--codec", "bf16", *options)))
    assert named in line
