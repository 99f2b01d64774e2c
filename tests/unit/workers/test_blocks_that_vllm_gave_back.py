# SPDX-License-Identifier: Apache-2.0
"""A request without blocks of its own fails by name; nothing is written, nothing is left behind."""

import numpy as np
import pytest

from .worker_pair import Consumer, Producer, changed, until, values

TOKENS = 100


@pytest.fixture
def one(ucx_loop, tmp_path):
    producer = Producer(ucx_loop, tmp_path / "producer", codec="hadamard")
    yield producer
    producer.close()


@pytest.fixture
def other(ucx_loop, tmp_path):
    consumer = Consumer(ucx_loop, tmp_path / "consumer")
    consumer.worker._null_block = 0
    return consumer


@pytest.mark.parametrize("blocks", [[0, 1, 2, 3, 4, 5, 6], [9, 8, 7], [9, 8, 7, 9, 6, 5, 4]])
def test_a_load_into_blocks_of_others_is_refused(one, other, blocks):
    one.prefill("r", TOKENS, one.plan())
    slots = np.arange(other.cache.num_slots)
    before = values(other.cache, slots)
    load = changed(one.load("r", TOKENS, one.plan()), block_ids=blocks)
    assert "no KV blocks of their own" in other.fetch(load)
    assert "r" in other.received
    assert values(other.cache, slots).equal(before)
    assert other.idle
    until(lambda: len(one.worker._store) == 0)  # released, not left to its lease
    one.finish("r")


def test_the_others_go_on(one, other):
    one.prefill("r", TOKENS, one.plan())
    one.prefill("s", TOKENS, one.plan())
    bad = one.load("r", TOKENS, one.plan())
    good = changed(one.load("s", TOKENS, one.plan()), block_ids=list(range(1, 8)))
    other.step(loads=[bad, good])
    assert other.settle("s") is None
    assert "r" in other.failed


def test_a_prefill_whose_blocks_are_gone_fails_its_transfer(one):
    one.worker._null_block = 0
    one.prefill("r", TOKENS, one.plan())  # from block 0 on
    released = one.events.named("released")
    assert "no KV blocks of their own" in released[0]["cause"]
    one.finish("r")
    assert len(one.worker._store) == 0
    one.prefill("s", TOKENS, one.plan(), start_slot=16)
    one.finish("s")
    assert len(one.events.named("chunk_encoded")) == 1
