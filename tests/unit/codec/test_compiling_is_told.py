# SPDX-License-Identifier: Apache-2.0
"""A start that compiles says so; one that finds its kernels says nothing."""

import json
import logging
from typing import ClassVar

import pytest
from typer.testing import CliRunner

from lynx_connector.cli import app
from lynx_connector.codec import KVGeometry, compiling
from lynx_connector.codec.cache import CodecCache


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, "vllm.lynx")
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.fixture
def timers(monkeypatch):
    """Timers that go off when a test says so; seconds pass likewise."""

    class Timer:
        made: ClassVar[list["Timer"]] = []
        now = 0.0

        def __init__(self, seconds, function, arguments):
            self.work, self.cancelled = (lambda: function(*arguments)), False
            self.made.append(self)

        def start(self):
            pass

        def cancel(self):
            self.cancelled = True

    Timer.made = []
    monkeypatch.setattr(compiling.threading, "Timer", Timer)
    monkeypatch.setattr(compiling.time, "monotonic", lambda: Timer.now)
    return Timer


def test_nothing_is_said_of_kernels_that_are_there(said, timers):
    with compiling.compiling("codec x"):
        timers.now += 1
    assert said() == [] and timers.made[0].cancelled


def test_a_line_before_and_one_after(said, timers):
    with compiling.compiling("codec x"):
        timers.made[0].work()
        assert len(said()) == 1 and "codec x" in said()[0] and "lynx warm" in said()[0]
        timers.now += 100
    assert said()[1:] == ["lynx: kernels for codec x: compiled in 100 s"]


def test_a_compilation_that_fails_leaves_no_timer(said, timers):
    with pytest.raises(ZeroDivisionError), compiling.compiling("codec x"):
        raise ZeroDivisionError
    assert timers.made[0].cancelled and said() == []


@pytest.mark.parametrize("what", ["hadamard", "int8"])
def test_codecs_are_compiled_under_watch(timers, what):
    CodecCache(KVGeometry(1, 1, 64, "float32")).get(what)
    assert len(timers.made) == 1 and timers.made[0].cancelled


@pytest.fixture
def model(tmp_path):
    config = {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "hidden_size": 128,
        "dtype": "float32",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def warm(*arguments):
    return CliRunner().invoke(app, ["warm", *map(str, arguments)])


def test_the_command_compiles_for_a_models_head_size_and_dtype(model):
    done = warm(model, "--dtype", "float32")
    assert done.exit_code == 0, done.output
    assert "head size 64 and float32 are compiled" in done.output
    for name in ("bf16", "hadamard", "klt", "exact tier"):
        assert name in done.output


def test_the_dtype_is_the_one_that_vllm_takes(model, monkeypatch):
    """Without weights in the folder: only config.json is read."""
    from lynx_connector.cli import run_warm

    asked = []
    monkeypatch.setattr(run_warm, "warm", lambda geometry, console: asked.append(geometry))
    assert warm(model).exit_code == 0
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    assert warm(model).exit_code == 0
    assert [one.dtype for one in asked] == ["bfloat16", "float16"]
    assert asked[0].head_dim == 64


def test_the_command_explains_what_it_cannot_do(model, tmp_path):
    done = warm(model, "--dtype", "int3")
    assert done.exit_code == 2 and "--dtype int3" in done.output
    done = warm(tmp_path / "absent")
    assert done.exit_code == 2 and "lynx warm:" in done.output
    (model / "config.json").write_text("{")
    assert warm(model).exit_code == 2
