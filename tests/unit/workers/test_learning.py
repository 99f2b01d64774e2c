# SPDX-License-Identifier: Apache-2.0
"""Learning beside encoding: when tables are built, who hears of them, what survives a restart."""

import numpy as np
import pytest
import torch
from lynx_kernels.shared.rotation import NO_ROTATION

from lynx_connector.producer.learning import FIRST_TABLES_TOKENS, OnlineLearning
from lynx_connector.producer.queries import QuerySample
from lynx_connector.telemetry.events import SILENT

from .worker_pair import COMPAT, geometry, learned, noise_cache


class FakeTables:
    digest = "0" * 32

    def to_bytes(self):
        return b""


class FakeLearner:
    rotation = NO_ROTATION

    def __init__(self, broken=False):
        self.tokens, self.positions, self.broken = 0, [], broken

    def observe(self, cache, slots, first_position):
        self.tokens += len(slots)
        self.positions.append(first_position)

    def observe_queries(self, queries):
        raise ValueError("queries of another shape")

    def build(self):
        if self.broken:
            raise ValueError("singular")
        return FakeTables()


def fed(learn_tokens, learned_tokens=0, chunk=500, chunks=40, **options):
    learner, published = FakeLearner(**options), []
    learning = OnlineLearning(
        learner,
        learn_tokens,
        learned_tokens,
        lambda tables: None,
        lambda tables, tokens: published.append(tokens),
        SILENT,
    )
    for i in range(chunks):
        learning.observe(None, np.arange(chunk), i * chunk)
        learning.build_if_due()
        if learning._builder:
            learning._builder.join()
    return learner, published, learning


@pytest.mark.parametrize(
    ("learn_tokens", "learned_tokens", "expected"),
    [
        (8192, 0, [2500, 8192]),
        (1024, 0, [1024]),
        (FIRST_TABLES_TOKENS, 0, [FIRST_TABLES_TOKENS]),
        (8192, 2500, [8192]),
        (8192, 8192, []),
    ],
)
def test_tables_come_early_and_once_more(learn_tokens, learned_tokens, expected):
    learner, published, learning = fed(learn_tokens, learned_tokens)
    assert published == expected
    assert learner.tokens == (expected[-1] if expected else 0)
    assert not learning.active


def test_queries_that_cannot_be_learned_from_cost_only_themselves(caplog):
    _, _, learning = fed(8192, chunks=1)
    sample = QuerySample(torch.tensor([0]), {0: 5}, [torch.zeros(1, 2, 64)])
    learning.observe_queries(sample)
    assert "queries of another shape" in caplog.text
    assert learning.active


def test_a_learner_that_fails_ends_the_learning_only(caplog):
    _, published, learning = fed(8192, broken=True)
    assert published == []
    assert not learning.active
    assert "going on without" in caplog.text


def test_prompts_teach_the_worker_and_the_scheduler_half_hears_of_it(producer):
    one = producer(learn_tokens=4096)
    plan, names = one.plan("hadamard"), iter("abcdefghijklmnop")

    def prompts_until(condition):
        # What is prefilled while tables are built is not observed, so that the number varies.
        while not condition():
            name = next(names)
            one.prefill(name, 1500, plan)
            one.finish(name)
            one.worker._store.drop("t-" + name, "test")
            if one.worker._learning._builder:
                one.worker._learning._builder.join()

    assert one.worker.take_report() == {}
    prompts_until(lambda: one.worker.current)
    first = one.worker.current
    assert one.worker.take_report() == {0: first}
    assert one.worker.take_report() == {}
    prompts_until(lambda: one.worker.current != first)
    # A request that began before the report arrived still names the first tables.
    assert one.worker.find(first).digest == first
    assert not one.worker._learning.active
    again = producer(learn_tokens=4096)
    assert again.worker.current == one.worker.current
    assert again.worker._learning is None
    more = producer(learn_tokens=8192)
    assert more.worker._learning.active  # what it knows comes from fewer tokens


def test_seen_tokens_and_exact_ones_teach_nothing(producer, monkeypatch):
    from lynx_connector.engine.metadata import EncodeChunk, LynxMetadata

    one = producer(learn_tokens=4096)
    seen = []
    monkeypatch.setattr(
        one.worker._learning,
        "observe",
        lambda cache, slots, position: seen.append((position, position + len(slots))),
    )
    plan = one.plan("hadamard")
    for start, end, fresh in [(0, 96, 64), (96, 200, 96)]:
        ids = list(range(start // 16, -(-end // 16)))
        chunk = EncodeChunk("r", "t", 200, start, end, ids, plan, fresh)
        one.worker.submit(LynxMetadata(encode=[chunk]))
    one.finish("r")
    assert seen == [(64, 96), (96, 184)]
    one.worker._store.drop("t", "test")


def test_no_learning_where_it_is_switched_off(producer):
    assert producer(learn_tokens=0).worker._learning is None
    assert producer(codec="hadamard").worker._learning is None


def test_calibrated_tables_are_used_without_learning(producer, tmp_path):
    from lynx_connector.codec.table_store import store_tables

    tables = learned(noise_cache(2048, 3), 2048)
    path = store_tables(tmp_path / "producer", COMPAT, 0, 1, tables, tokens=2048)
    assert path.name == f"{tables.digest}.tables"
    one = producer(learn_tokens=0)
    assert one.worker.current == tables.digest
    assert one.worker.find(tables.digest).geometry == geometry()
