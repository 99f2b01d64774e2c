# SPDX-License-Identifier: Apache-2.0
"""A tiny model folder and texts that it can tokenize."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.scheduler import tiny_llama

WORDS = ("the", "wire", "tier", "cache", "lynx", "first", "token", "anchor", "scale", "reads")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """Two layers with random weights; 1,024 positions."""
    return tiny_llama.write(tmp_path_factory.mktemp("bench") / "tiny-llama")


@pytest.fixture(scope="session")
def make_text(tmp_path_factory) -> Callable[..., Path]:
    """Writes a text of `words` random words, about three tokens each for the tiny tokenizer."""
    folder = tmp_path_factory.mktemp("texts")

    def write(name: str, words: int = 400) -> Path:
        file = folder / name
        file.write_text(" ".join(random.Random(name).choices(WORDS, k=words)))
        return file

    return write
