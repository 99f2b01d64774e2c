# SPDX-License-Identifier: Apache-2.0
"""`lynx calibrate`: what it stores is what a producer of the same model begins with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from lynx_connector.bench.calibration import resolve_dtype
from lynx_connector.cli import app
from lynx_connector.codec import KVGeometry
from lynx_connector.codec.table_store import TableStore
from lynx_connector.wire.identity import tables_key


@pytest.fixture
def calibrate(model_folder, tmp_path) -> Callable[..., Result]:
    def run(*texts: Path, options: tuple[str, ...] = (), model: Path = model_folder) -> Result:
        arguments = ["calibrate", str(model), "--tables-dir", str(tmp_path / "tables")]
        arguments += ["--text", *map(str, texts)]
        return CliRunner().invoke(app, [*arguments, *options])

    return run


def producer_store(
    root: Path, model: Path, rank: int = 0, ranks: int = 1, dtype: str = "bfloat16"
) -> TableStore:
    """The store as the worker of a producer opens it."""
    geometry = KVGeometry(2, 2 // ranks, 64, dtype)
    key = tables_key(str(model), ranks, asdict(geometry))
    return TableStore(root, key, rank, ranks, geometry)


def test_a_producer_begins_with_the_tables(calibrate, make_text, model_folder, tmp_path):
    result = calibrate(make_text("one.txt"), make_text("two.txt"))
    assert result.exit_code == 0, result.output
    found = producer_store(tmp_path / "tables", model_folder).load_current()
    assert found is not None
    tables, tokens = found
    assert tokens > 1024
    assert tables.digest in result.output
    assert f"{len(tables.to_bytes()):,} bytes" in result.output
    assert " s, " in result.output


def test_tokens_are_limited(calibrate, make_text, model_folder, tmp_path):
    result = calibrate(make_text("one.txt"), make_text("two.txt"), options=("--tokens", "600"))
    assert result.exit_code == 0, result.output
    found = producer_store(tmp_path / "tables", model_folder).load_current()
    assert found is not None and found[1] == 599  # the first one travels exact


def test_every_rank_has_its_own(calibrate, make_text, model_folder, tmp_path):
    options = ("--tensor-parallel-size", "2", "--dtype", "float16")
    assert calibrate(make_text("one.txt"), make_text("two.txt"), options=options).exit_code == 0
    digests = set()
    for rank in range(2):
        store = producer_store(tmp_path / "tables", model_folder, rank, 2, "float16")
        found = store.load_current()
        assert found is not None
        digests.add(found[0].digest)
    assert len(digests) == 2


def test_auto_dtype_is_vllms(model_folder):
    # A float32 model is served in bfloat16 by default.
    assert resolve_dtype(str(model_folder), "auto") == "bfloat16"
    assert resolve_dtype(str(model_folder), "float16") == "float16"


@pytest.mark.parametrize(
    ("words", "options", "named"),
    [
        (20, (), "shorter than a prompt"),
        (110, (), "at least 512 are needed"),
        (400, ("--tensor-parallel-size", "3"), "does not divide the 2 KV heads"),
        (400, ("--dtype", "int8"), "--dtype int8"),
    ],
)
def test_bad_input(calibrate, make_text, tmp_path, words, options, named):
    result = calibrate(make_text(f"{words}.txt", words), options=options)
    assert result.exit_code == 2, result.output
    (line,) = result.output.strip().splitlines()
    assert line.startswith("lynx calibrate: ") and named in line
    assert not (tmp_path / "tables").exists()


def test_a_folder_without_model(calibrate, make_text, tmp_path):
    result = calibrate(make_text("one.txt"), model=tmp_path)
    assert result.exit_code == 2
    assert "no config.json" in result.output
