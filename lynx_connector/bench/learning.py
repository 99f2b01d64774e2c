# SPDX-License-Identifier: Apache-2.0
"""Tables for the texts of a benchmark, learned as the product learns them, never from the texts
that they are measured on.

The texts are dealt into two folds; each is measured with the tables learned from the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from lynx_connector.bench.errors import BenchError
from lynx_connector.bench.hf_model import HFModel
from lynx_connector.bench.methods import paged_cache
from lynx_connector.bench.texts import build_prompts
from lynx_connector.codec import KltTables
from lynx_connector.codec.klt_learner import TableLearner
from lynx_connector.config import EXACT_FIRST_TOKENS, LynxConfig

FOLDS = 2
LEARN_TOKENS = int(LynxConfig.model_fields["learn_tokens"].default)
"""Tokens that a producer learns from unless it is told otherwise."""


def check_enough_texts(files: Sequence[Path]) -> None:
    """Raises BenchError for fewer texts than folds."""
    if len(files) < FOLDS:
        raise BenchError(
            f"klt learns its tables from texts that are not measured: give at least {FOLDS} texts "
            "by --text, or choose other codecs by --codec"
        )


def observe(learner: TableLearner, values: torch.Tensor, queries: torch.Tensor) -> None:
    """Learn from KV [T, L, 2, H, D] of a prompt's first T tokens, but those that travel exact, and
    from queries [n, L, query heads, D] of some of them."""
    lossy = values[EXACT_FIRST_TOKENS:]
    learner.observe(paged_cache(lossy), np.arange(len(lossy)), EXACT_FIRST_TOKENS)
    if len(queries):
        learner.observe_queries(queries)


class TwoFolds:
    """Tables of both folds. Raises BenchError as `check_enough_texts`."""

    def __init__(self, model: HFModel, files: Sequence[Path], prompt_tokens: int) -> None:
        check_enough_texts(files)
        self._model = model
        self._files = files
        self._prompt_tokens = prompt_tokens
        self._tables: list[KltTables] = []

    def learn(self, step: Callable[[str], None] = lambda what: None) -> None:
        """Learn the tables of both folds; `step` is called once a text."""
        for fold in range(FOLDS):
            learner = TableLearner(self._model.geometry, self._model.rotation)
            for file in self._files[fold::FOLDS]:
                self._read(learner, file)
                step(f"{file.name}: learning")
            self._tables.append(learner.build())

    def tables_for(self, text: int) -> KltTables:
        """Tables for text number `text`, learned from the other fold."""
        return self._tables[(text + 1) % FOLDS]

    def _read(self, learner: TableLearner, file: Path) -> None:
        room = LEARN_TOKENS - learner.tokens
        if room > 0:
            tokenizer = self._model.tokenizer
            prompt = build_prompts(tokenizer, file, self._prompt_tokens, 1).prompts[0][:room]
            self._model.check_length(len(prompt))
            observe(learner, *self._model.prefill_for_learning(prompt))
