# SPDX-License-Identifier: Apache-2.0
"""The demo's model: when it is made, when it is kept, and what a failure says."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from lynx_connector.testbed import model as model_module
from lynx_connector.testbed.gguf_model import _undo_rope_permutation
from lynx_connector.testbed.model import (
    CONVERSION,
    MARKER,
    WHEEL,
    ModelError,
    ensure_model,
    is_complete,
    model_folder,
)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("LYNX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make_complete(folder: Path, **changes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    marker = {"source": WHEEL, "conversion": CONVERSION, "files": {"config.json": 2}} | changes
    (folder / MARKER).write_text(json.dumps(marker))


def test_a_complete_model_is_used_without_network(monkeypatch):
    make_complete(model_folder())
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("nothing to fetch"))
    assert ensure_model() == model_folder()


@pytest.mark.parametrize(
    "changes",
    [{"conversion": CONVERSION - 1}, {"source": "other"}, {"files": {"absent": 1}}, {"files": []}],
    ids=["older conversion", "other source", "file missing", "malformed marker"],
)
def test_an_incomplete_model_is_seen(changes):
    make_complete(model_folder(), **changes)
    assert not is_complete(model_folder())


def test_a_truncated_file_is_seen():
    make_complete(model_folder())
    (model_folder() / "config.json").write_text("")
    assert not is_complete(model_folder())


def test_without_network_the_message_says_what_to_do(monkeypatch, cache: Path):
    def no_network(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no route to host")

    monkeypatch.setattr(subprocess, "run", no_network)
    with pytest.raises(ModelError, match=r"no route to host.*index settings.*--model"):
        ensure_model()
    assert list((cache / "models").iterdir()) == [], "nothing half made is left"


def test_without_space_nothing_is_fetched(monkeypatch):
    usage = type("Usage", (), {"free": 1 << 20})
    monkeypatch.setattr(model_module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ModelError, match=r"1 MiB free.*LYNX_CACHE"):
        ensure_model()


@pytest.fixture
def convert_as(monkeypatch, tmp_path: Path):
    """Conversion by the given function, of a file that was not fetched."""

    def replace(convert) -> None:
        monkeypatch.setattr(model_module, "_fetch", lambda scratch, progress: tmp_path / "x.gguf")
        monkeypatch.setattr("lynx_connector.testbed.gguf_model.convert", convert)

    return replace


def test_other_users_can_read_the_model(convert_as):
    """A container makes it as one user and serves it as another."""

    def convert(gguf_file: Path, made: Path) -> None:
        for name in ("config.json", "model.safetensors"):
            (made / name).write_text("{}")
            (made / name).chmod(0o600)

    convert_as(convert)
    folder = ensure_model()
    modes = {file.name: file.stat().st_mode & 0o777 for file in folder.iterdir()}
    assert modes == dict.fromkeys(("config.json", "model.safetensors", MARKER), 0o644)
    assert folder.stat().st_mode & 0o005 == 0o005


def test_a_package_that_the_conversion_lacks_is_named(convert_as):
    """transformers' own error has no name."""

    def convert(gguf_file: Path, made: Path) -> None:
        raise ModuleNotFoundError("Could not import module 'LlamaConfig'. Is it installed?")

    convert_as(convert)
    with pytest.raises(ModelError, match=r"LlamaConfig.*pip install"):
        ensure_model()


def test_a_damaged_model_is_replaced_as_a_whole(tmp_path: Path):
    folder = model_folder()
    folder.mkdir(parents=True)
    (folder / "half-written").write_text("x")
    made = tmp_path / "made"
    make_complete(made)
    model_module._publish(made, folder)
    assert is_complete(folder)
    assert not (folder / "half-written").exists()
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]


def test_a_model_that_another_process_made_first_is_kept(tmp_path: Path):
    make_complete(model_folder())
    (model_folder() / "theirs").write_text("x")
    made = tmp_path / "made"
    make_complete(made)
    model_module._publish(made, model_folder())
    assert (model_folder() / "theirs").exists()


def test_rotary_rows_come_back_from_llama_cpps_order():
    heads, dim, columns = 3, 8, 5
    rows = np.arange(heads * dim * columns).reshape(heads * dim, columns)
    # llama.cpp's converter: halves of a head are interleaved.
    permuted = rows.reshape(heads, 2, dim // 2, columns).swapaxes(1, 2).reshape(rows.shape)
    assert not np.array_equal(permuted, rows)
    np.testing.assert_array_equal(_undo_rope_permutation(permuted, heads), rows)
