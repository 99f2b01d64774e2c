# SPDX-License-Identifier: Apache-2.0
"""Transfers whose prefill still runs: fetched before there is anything, given up, interrupted."""

import time

import numpy as np
import pytest
import torch

from lynx_connector.engine.metadata import EncodeChunk, LynxMetadata, PrefillOutcome

from .worker_pair import BLOCK, Consumer, Producer, until, values

TOKENS = 1000
FIRST = 400


@pytest.fixture
def pair(ucx_loop, tmp_path):
    producer = Producer(ucx_loop, tmp_path / "p", codec="bf16", lease_seconds=0.5, learn_tokens=0)
    consumer = Consumer(ucx_loop, tmp_path / "c", transfer_timeout_seconds=2.5)
    yield producer, consumer
    producer.close()


def chunk(producer, start, end, name="r"):
    """One chunk of a prefill whose tokens lie in blocks of their own number."""
    ids = list(range(start // BLOCK, -(-end // BLOCK)))
    plan = producer.plan("bf16")
    one = EncodeChunk(name, "t-" + name, TOKENS, start, end, ids, plan, start)
    producer.worker.submit(LynxMetadata(encode=[one]))


def fetch(producer, consumer, name="r"):
    consumer.step(loads=[producer.load(name, TOKENS, producer.plan("bf16"))])


def drive(consumer, condition, seconds=20.0):
    until(lambda: consumer.step() or condition(), seconds)


def written(consumer):
    return sum(e["event"] == "frame" for e in consumer.events.seen)


def assert_equal_caches(producer, consumer):
    slots = np.arange(TOKENS)
    assert torch.equal(values(consumer.cache, slots), values(producer.cache, slots))


def test_chunks_travel_as_they_are_computed_and_a_long_prefill_is_no_silence(pair):
    producer, consumer = pair
    chunk(producer, 0, FIRST)
    fetch(producer, consumer)
    drive(consumer, lambda: written(consumer))
    began = time.monotonic()
    drive(consumer, lambda: time.monotonic() - began > 3.5)  # longer than lease and timeout
    assert not consumer.failed
    chunk(producer, FIRST, TOKENS)
    assert consumer.settle("r") is None
    assert_equal_caches(producer, consumer)
    until(lambda: len(producer.worker._store) == 0)
    assert producer.worker.take_unwanted() == set()  # it was whole when it was released


def test_prefill_that_nobody_waits_for_any_more(pair):
    producer, consumer = pair
    chunk(producer, 0, FIRST)
    fetch(producer, consumer)
    drive(consumer, lambda: written(consumer))
    consumer.step(cancelled=[("r", "request ended")])
    until(lambda: len(producer.worker._store) == 0)
    assert producer.worker.take_unwanted() == {"r"}
    chunk(producer, FIRST, TOKENS)  # a step that was under way
    producer.finish("r")
    assert producer.worker._store.used_bytes == 0
    assert consumer.idle


def test_preemption_keeps_what_was_encoded(pair):
    producer, consumer = pair
    chunk(producer, 0, FIRST)
    fetch(producer, consumer)
    producer.worker.apply_drops(LynxMetadata(preempted={"r"}))
    assert not producer.worker._pending  # its blocks may be overwritten from here on
    drive(consumer, lambda: written(consumer))
    chunk(producer, FIRST, TOKENS)
    assert consumer.settle("r") is None
    assert_equal_caches(producer, consumer)


def test_prefill_that_fails_says_why(pair):
    producer, consumer = pair
    chunk(producer, 0, FIRST)
    fetch(producer, consumer)
    drive(consumer, lambda: written(consumer))
    outcome = PrefillOutcome("r", "t-r", None, "prefill ended early (FINISHED_ERROR)")
    producer.worker.apply_drops(LynxMetadata(outcomes=[outcome]))
    assert "FINISHED_ERROR" in consumer.settle("r")
    producer.finish("r")
    assert len(producer.worker._store) == 0
    assert consumer.idle


def test_consumer_that_waits_hears_of_a_drop(pair):
    producer, consumer = pair
    chunk(producer, 0, FIRST)
    fetch(producer, consumer)
    drive(consumer, lambda: written(consumer))
    producer.worker.apply_drops(LynxMetadata(dropped=["r"]))
    assert "request ended before its prefill did" in consumer.settle("r")


def test_decode_leg_that_never_comes(pair):
    """The lease begins with the prefill's end, not before."""
    producer, _ = pair
    chunk(producer, 0, FIRST)
    time.sleep(1.7)  # the lease, and two rounds of its watch
    assert len(producer.worker._store) == 1
    chunk(producer, FIRST, TOKENS)
    until(lambda: len(producer.worker._store) == 0)
    assert producer.worker._store.used_bytes == 0
    assert producer.worker.take_unwanted() == set()


def test_decode_leg_that_comes_twice(pair, ucx_loop, tmp_path):
    """The first that has all releases the transfer; the other is told so."""
    producer, consumer = pair
    second = Consumer(ucx_loop, tmp_path / "c2", transfer_timeout_seconds=5)
    chunk(producer, 0, FIRST)
    fetch(producer, consumer)
    chunk(producer, FIRST, TOKENS)
    assert consumer.settle("r") is None
    until(lambda: len(producer.worker._store) == 0)
    fetch(producer, second)
    assert "transfer was released: done" in second.settle("r")
