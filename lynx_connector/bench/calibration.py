# SPDX-License-Identifier: Apache-2.0
"""Tables ahead of time, for a producer that has not run yet and without vLLM running."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from lynx_connector.bench.errors import BenchError
from lynx_connector.bench.hf_model import HFModel, load_config
from lynx_connector.bench.learning import observe
from lynx_connector.bench.texts import build_prompts
from lynx_connector.codec import KltTables, KVGeometry
from lynx_connector.codec.klt_learner import TableLearner
from lynx_connector.codec.types import DTYPES
from lynx_connector.config import MIN_LEARN_TOKENS
from lynx_connector.wire.identity import tables_key

PROMPT_TOKENS = 4096
"""Tokens taken of one text at most: attention of the reference model is quadratic in them."""
TEMPLATE_TOKENS = 128
"""Room for the chat template and the question around a text."""


@dataclass(frozen=True)
class ShardTables:
    """Tables of one tensor parallel rank, and what they cost.

    key: where a producer looks for them (`tables_key`); prefill_seconds: of all ranks together.
    """

    key: str
    tables: KltTables
    tokens: int
    prefill_seconds: float
    learn_seconds: float


def resolve_dtype(model: str, dtype: str, revision: str | None = None) -> str:
    """The KV cache's dtype that vLLM would choose for `--dtype DTYPE`.

    vLLM's "auto" is the model's own dtype, but bfloat16 for a float32 model. Raises BenchError for
    an unknown dtype, or a model that cannot be read.
    """
    if dtype != "auto":
        return dtype
    own = str(getattr(load_config(model, revision), "dtype", None)).removeprefix("torch.")
    return own if own in DTYPES and own != "float32" else "bfloat16"


def calibrate(
    model: HFModel,
    files: Sequence[Path],
    tokens: int,
    ranks: int = 1,
    *,
    model_id: str | None = None,
    step: Callable[[str], None] = lambda what: None,
) -> list[ShardTables]:
    """Tables of every rank, from at most `tokens` tokens of prompts around the files.

    Raises BenchError where texts are too short, or KV heads cannot be shared out.
    """
    whole = model.geometry
    if whole.num_kv_heads % ranks:
        raise BenchError(
            f"--tensor-parallel-size {ranks} does not divide the {whole.num_kv_heads} KV heads"
        )
    heads = whole.num_kv_heads // ranks
    shard = KVGeometry(whole.num_layers, heads, whole.head_dim, whole.dtype)
    learners = [TableLearner(shard, model.rotation) for _ in range(ranks)]
    longest = min(PROMPT_TOKENS, model.positions - TEMPLATE_TOKENS)
    prefilling, learning = 0.0, [0.0] * ranks
    for file in files:
        room = tokens - learners[0].tokens
        if room <= 0:
            break
        step(f"prefill of {file.name}")
        began = time.monotonic()
        prompt = build_prompts(model.tokenizer, file, min(room, longest), 1).prompts[0]
        model.check_length(len(prompt))
        values, queries = model.prefill_for_learning(prompt[:room])
        prefilling += time.monotonic() - began
        for rank, learner in enumerate(learners):
            began = time.monotonic()
            own = slice(rank * heads, (rank + 1) * heads)
            observe(learner, values[:, :, :, own], _query_heads(queries, whole, own))
            learning[rank] += time.monotonic() - began
    if learners[0].tokens < MIN_LEARN_TOKENS:
        raise BenchError(
            f"the texts have {learners[0].tokens} tokens together, "
            f"at least {MIN_LEARN_TOKENS} are needed"
        )
    step("building tables")
    key = tables_key(model.name, ranks, asdict(shard), revision=model.revision, model_id=model_id)
    return [
        _finish(key, learner, prefilling, seconds)
        for learner, seconds in zip(learners, learning, strict=True)
    ]


def _query_heads(queries: torch.Tensor, whole: KVGeometry, kv_heads: slice) -> torch.Tensor:
    """The query heads of some KV heads."""
    group = queries.shape[2] // whole.num_kv_heads
    return queries[:, :, kv_heads.start * group : kv_heads.stop * group]


def _finish(key: str, learner: TableLearner, prefilling: float, learning: float) -> ShardTables:
    began = time.monotonic()
    tables = learner.build()
    learning += time.monotonic() - began
    return ShardTables(key, tables, learner.tokens, prefilling, learning)
