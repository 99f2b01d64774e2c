# SPDX-License-Identifier: Apache-2.0
"""Learning tables from the prompts that are prefilled anyway."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from lynx_kernels.shared.paged import PagedKVCache
from lynx_kernels.shared.rotation import Rotation

from lynx_connector.codec import CodecError, KltTables
from lynx_connector.codec.cache import CodecCache
from lynx_connector.codec.klt_learner import TableLearner
from lynx_connector.config import FIRST_TABLES_TOKENS
from lynx_connector.engine.worker_context import WorkerContext
from lynx_connector.producer.queries import QuerySample
from lynx_connector.producer.tables import ProducerTables
from lynx_connector.telemetry.events import EventLog

logger = logging.getLogger("vllm.lynx.tables")


class Learner(Protocol):
    """What `OnlineLearning` needs of a `TableLearner`."""

    @property
    def tokens(self) -> int:
        """Tokens observed so far."""

    @property
    def rotation(self) -> Rotation:
        """What K is rotated back by."""

    def observe(self, cache: PagedKVCache, slots: np.ndarray, first_position: int) -> None:
        """Add the tokens at `slots`, positions first_position and up, to the statistics."""

    def observe_queries(self, queries: torch.Tensor) -> None:
        """Add queries [n, L, query heads, D] of some of these tokens, before RoPE."""

    def build(self) -> KltTables:
        """Tables from what was observed."""


class OnlineLearning:
    """Feeds a learner from the encoder thread and builds tables in a thread of its own.

    While tables are built nothing is observed, so that the statistics have one user at a time.
    Failure of the learner ends the learning, never a request. `prepare` runs before `publish`,
    for what the first request with new tables should not wait for.
    """

    def __init__(
        self,
        learner: Learner,
        learn_tokens: int,
        learned_tokens: int,
        prepare: Callable[[KltTables], object],
        publish: Callable[[KltTables, int], None],
        events: EventLog,
    ):
        self._learner = learner
        self._prepare = prepare
        self._publish = publish
        self._events = events
        marks = [] if learned_tokens else [min(FIRST_TABLES_TOKENS, learn_tokens)]
        if learned_tokens < learn_tokens and learn_tokens not in marks:
            marks.append(learn_tokens)
        self._marks = marks
        """Token counts at which tables are still to be built."""
        self._builder: threading.Thread | None = None
        self._queries = 0
        """Tokens whose queries were seen."""

    @property
    def active(self) -> bool:
        """Whether there is anything left to learn."""
        return bool(self._marks)

    def observe(self, cache: PagedKVCache, slots: np.ndarray, first_position: int) -> None:
        """Learn from tokens (encoder thread, while their blocks are held)."""
        if not self._marks or self._building():
            return
        try:
            room = self._marks[-1] - self._learner.tokens
            if room > 0:
                self._learner.observe(cache, slots[:room], first_position)
        except Exception:
            logger.exception("lynx: learning tables failed; going on without")
            self._marks = []

    def observe_queries(self, sample: QuerySample) -> None:
        """Learn what attention looks for (encoder thread)."""
        if not self._marks or self._building():
            return
        try:
            self._learner.observe_queries(sample.before_rope(self._learner.rotation))
            self._queries += len(sample.slots)
        except Exception:
            logger.exception(
                "lynx: learning from queries failed: klt's tables weigh them less and its drafts "
                "are a little worse; no request is affected"
            )

    def build_if_due(self) -> None:
        """Start building once enough tokens were seen (encoder thread, blocks given back)."""
        if self._marks and not self._building() and self._learner.tokens >= self._marks[0]:
            self._builder = threading.Thread(target=self._build, name="lynx-learn", daemon=True)
            self._builder.start()

    def _building(self) -> bool:
        return self._builder is not None and self._builder.is_alive()

    def _build(self) -> None:
        began = time.monotonic()
        tokens = self._learner.tokens
        try:
            tables = self._learner.build()
            self._prepare(tables)
            self._publish(tables, tokens)
            self._events(
                "tables_learned",
                None,
                digest=tables.digest,
                tokens=tokens,
                queries=self._queries,
                seconds=round(time.monotonic() - began, 4),
            )
        except Exception:
            logger.exception("lynx: learning tables failed; going on without")
            self._marks = []
            return
        self._marks = [mark for mark in self._marks if mark > tokens]
        logger.info(
            "lynx: next requests use learned tables %s: %d tokens, queries of %d, built in %.2f s, "
            "%d bytes%s",
            tables.digest,
            tokens,
            self._queries,
            time.monotonic() - began,
            len(tables.to_bytes()),
            "" if self._marks else "; learning is done",
        )

    def stop(self) -> None:
        """Wait a moment for a build under way."""
        self._marks = []
        if self._builder is not None:
            self._builder.join(timeout=5.0)


def start_learning(
    context: WorkerContext, tables: ProducerTables, codecs: CodecCache
) -> OnlineLearning | None:
    """What learns on this worker; None where all is known, or nothing can be."""
    config = context.config
    if config.learn_tokens <= tables.learned_tokens:
        return None
    try:
        learner = TableLearner(context.geometry, context.rotation)
    except CodecError as error:
        logger.warning("lynx: no tables can be learned for this model: %s", error)
        return None
    return OnlineLearning(
        learner,
        config.learn_tokens,
        tables.learned_tokens,
        lambda new: codecs.get(config.codec, config.anchor_bits, new),
        tables.publish,
        context.events,
    )
