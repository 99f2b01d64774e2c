# SPDX-License-Identifier: Apache-2.0
"""Learned tables between two running workers: announced, asked for once, refused, kept."""

import json
import threading

import numpy as np
import pytest
import torch
from lynx_kernels.klt import cpu as klt_cpu

from lynx_connector.codec import CodecError, get_codec
from lynx_connector.codec.cache import CodecCache
from lynx_connector.codec.table_store import TableStore, store_tables
from lynx_connector.consumer.tables import ConsumerTables
from lynx_connector.transport import sources

from .worker_pair import COMPAT, changed, geometry, learned, noise_cache, until, values

TOKENS = 200


@pytest.fixture(scope="module")
def tables():
    return learned(noise_cache(2048, 1), 2048)


@pytest.fixture
def warm(producer, tmp_path, tables):
    """A producer that begins with tables."""
    store_tables(tmp_path / "producer", COMPAT, 0, 1, tables, tokens=1 << 20)
    return producer()


def send(producer, consumer, name, plan, num_tokens=TOKENS, **load):
    producer.prefill(name, num_tokens, plan)
    cause = consumer.fetch(changed(producer.load(name, num_tokens, plan), **load))
    producer.finish(name)
    return cause


def expected(producer, plan, tables, num_tokens=TOKENS):
    """What encode and decode in one place make of the producer's tokens."""
    codec = get_codec(plan.codec, geometry(), anchor_bits=plan.anchor_bits, tables=tables)
    local = noise_cache(num_tokens, 5)
    slots = np.arange(num_tokens)
    for layer in range(2):
        local.scatter(layer, slots, producer.cache.gather(layer, slots))
    middle = slots[1 : num_tokens - 16]
    rows = {t: np.empty((len(middle), codec.bytes_per_token(t)), np.uint8) for t in codec.tiers}
    codec.encode(local, middle, rows, 1)
    codec.decode(list(rows.values()), local, middle, 1)
    return values(local, slots)


@pytest.mark.parametrize("speculative", [True, False])
@pytest.mark.parametrize("anchor_bits", [3, 4, 5])
def test_tables_are_fetched_and_the_cache_is_what_they_decode_to(
    warm, consumer, tables, anchor_bits, speculative
):
    plan = warm.plan("klt", [tables.digest], anchor_bits)
    one = consumer()
    assert send(warm, one, "r", plan, speculative=speculative) is None
    assert torch.equal(values(one.cache, np.arange(TOKENS)), expected(warm, plan, tables))


def test_a_consumer_asks_once_however_many_transfers_wait(warm, consumer, tables):
    plan, one = warm.plan("klt", [tables.digest]), consumer()
    names = [f"r{i}" for i in range(6)]
    for name in names:
        warm.prefill(name, TOKENS, plan)
    one.step(loads=[warm.load(name, TOKENS, plan) for name in names])
    assert [one.settle(name) for name in names] == [None] * 6
    assert send(warm, one, "later", plan) is None
    assert len(warm.events.named("tables_sent")) == 1
    for name in names:
        warm.finish(name)


def test_announced_tables_are_fetched_before_they_are_needed(warm, consumer, tables):
    one = consumer()
    assert send(warm, one, "plain", warm.plan("hadamard")) is None
    until(lambda: one.worker._tables.get(tables.digest))
    assert len(warm.events.named("tables_sent")) == 1
    assert send(warm, one, "r", warm.plan("klt", [tables.digest])) is None
    assert len(warm.events.named("tables_sent")) == 1


def test_frames_go_on_while_tables_are_made_ready(warm, consumer, tables, monkeypatch):
    """Keeping tables takes a file, and on a GPU a compiler: the connection does not wait for it."""
    plan, one, ready = warm.plan("klt", [tables.digest]), consumer(), threading.Event()
    accept = one.worker._tables.accept

    def slowly(*arguments):
        assert ready.wait(20)
        accept(*arguments)

    monkeypatch.setattr(one.worker._tables, "accept", slowly)
    warm.prefill("r", TOKENS, plan)
    one.step(loads=[warm.load("r", TOKENS, plan)])
    try:
        until(lambda: one.worker._active["r"].wire_bytes[1])
    finally:
        ready.set()
    assert one.settle("r") is None
    assert torch.equal(values(one.cache, np.arange(TOKENS)), expected(warm, plan, tables))
    warm.finish("r")


def test_tables_that_cannot_be_kept_fail_their_transfers(warm, consumer, tables, monkeypatch):
    plan, one = warm.plan("klt", [tables.digest]), consumer()

    def broken(*arguments):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(one.worker._tables, "accept", broken)
    assert "cannot be kept: no compiler" in send(warm, one, "r", plan)
    assert send(warm, one, "plain", warm.plan("hadamard")) is None


def test_kernels_are_compiled_before_there_are_tables(producer, consumer, monkeypatch):
    """At the first tables it would hold up the transfer that needs them, for seconds."""
    compiled = []
    monkeypatch.setattr(klt_cpu, "compile_kernels", compiled.append)
    consumer()
    assert compiled == [4]
    producer()
    assert compiled == [4, 4]
    producer(folder="other", codec="hadamard")
    assert compiled == [4, 4]


def test_a_restarted_consumer_has_its_tables(warm, consumer, tables, tmp_path):
    plan = warm.plan("klt", [tables.digest])
    assert send(warm, consumer(), "r", plan) is None
    until(lambda: any((tmp_path / "consumer").rglob(f"{tables.digest}.tables")))
    assert send(warm, consumer(), "again", plan) is None
    assert len(warm.events.named("tables_sent")) == 1
    assert send(warm, consumer(folder="another"), "third", plan) is None
    assert len(warm.events.named("tables_sent")) == 2


def test_unwritable_folder_costs_only_the_next_start(warm, consumer, tables, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    one = consumer(folder="file/below")
    plan = warm.plan("klt", [tables.digest])
    assert send(warm, one, "r", plan) is None
    assert send(warm, one, "again", plan) is None
    assert len([r for r in caplog.records if "cannot be" in r.message]) >= 1


class BadTables:
    """Stands for tables and sends other bytes in their place, `times` times."""

    def __init__(self, tables, times, data):
        self.tables, self.times, self.data = tables, times, data

    def to_bytes(self):
        self.times -= 1
        return self.data if self.times >= 0 else self.tables.to_bytes()


def flipped(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize(
    "make_bad",
    [
        flipped,
        lambda data: b"?" * len(data),
        lambda data: data[:-1],
        lambda data: data[:1],
        lambda data: data + b"\0" * (1 << 24),
    ],
    ids=["wrong hash", "unknown version", "short", "one byte", "too large"],
)
@pytest.mark.parametrize("times", [1, 2])
def test_unusable_tables_are_asked_for_once_more(
    warm, consumer, tables, monkeypatch, caplog, make_bad, times
):
    """A good second answer is used; a bad one fails what needs it, and only that."""
    bad = BadTables(tables, times, make_bad(tables.to_bytes()))
    one, plan = consumer(), warm.plan("klt", [tables.digest])
    warm.prefill("r", TOKENS, plan)
    warm.finish("r")
    monkeypatch.setattr(warm.worker, "find", lambda digest: bad)
    cause = send_encoded(warm, one, "r", plan)
    refusals = [record for record in caplog.records if "refused" in record.message]
    assert len(refusals) >= times
    assert (cause is None) == (times == 1)
    if cause:
        assert f"tables {tables.digest}: refused" in cause
        # Two for the announcement and two for the transfer, where that came too late for the first.
        assert len(warm.events.named("tables_sent")) in (2, 4)
    assert send(warm, one, "plain", warm.plan("hadamard")) is None


def send_encoded(producer, consumer, name, plan):
    return consumer.fetch(producer.load(name, TOKENS, plan))


def test_corrupt_payload_is_asked_for_once_more(warm, consumer, tables, monkeypatch):
    whole, calls = sources.checksum, []

    def checksum(payload):
        if payload.nbytes == len(tables.to_bytes()):
            calls.append(payload)
            return whole(payload) if len(calls) > 1 else 7
        return whole(payload)

    monkeypatch.setattr(sources, "checksum", checksum)
    assert send(warm, consumer(), "r", warm.plan("klt", [tables.digest])) is None
    assert len(calls) == 2


def test_tables_that_the_producer_has_lost(warm, consumer, tables, monkeypatch):
    plan, one = warm.plan("klt", [tables.digest]), consumer()
    warm.prefill("r", TOKENS, plan)
    warm.finish("r")
    monkeypatch.setattr(warm.worker, "find", lambda digest: None)
    assert "does not have these tables" in send_encoded(warm, one, "r", plan)


def test_tables_that_never_come(warm, consumer, tables, monkeypatch):
    def nothing(self, max_bytes):
        self._taken = True

    monkeypatch.setattr(sources.TablesSource, "take", nothing)
    one = consumer(transfer_timeout_seconds=1)
    cause = send(warm, one, "r", warm.plan("klt", [tables.digest]))
    assert "silent" in cause or "not sent within" in cause
    warm.worker._store.drop("t-r", "test")


def test_cancelled_while_waiting_for_tables(warm, consumer, tables, monkeypatch):
    def nothing(self, max_bytes):
        self._taken = True

    monkeypatch.setattr(sources.TablesSource, "take", nothing)
    one, plan = consumer(), warm.plan("klt", [tables.digest])
    warm.prefill("r", TOKENS, plan)
    one.step(loads=[warm.load("r", TOKENS, plan)])
    until(lambda: one.worker._active["r"].wire_bytes[1])
    one.step(cancelled=[("r", "request ended")])
    assert one.received == {"r"}
    warm.finish("r")


def test_tables_in_the_handoff_that_the_producer_never_had(warm, consumer, tables):
    plan = warm.plan("klt", ["0" * 32])
    cause = send(warm, consumer(), "r", plan)
    assert "tables" in cause


def test_tables_of_another_shape_on_disk_are_not_used(consumer, warm, tables, tmp_path, caplog):
    folder = TableStore(tmp_path / "consumer", COMPAT, 0, 1, geometry()).folder
    folder.mkdir(parents=True)
    (folder / f"{tables.digest}.tables").write_bytes(b"junk")
    assert send(warm, consumer(), "r", warm.plan("klt", [tables.digest])) is None
    named = [r for r in caplog.records if f"{tables.digest}.tables ignored" in r.getMessage()]
    assert len(named) == 1


def test_current_file_that_is_junk_means_a_cold_start(producer, tmp_path, caplog):
    folder = TableStore(tmp_path / "producer", COMPAT, 0, 1, geometry()).folder
    folder.mkdir(parents=True)
    (folder / "current.json").write_text(json.dumps({"digest": "../x", "tokens": 1}))
    assert producer().worker.current == ""
    assert "current.json ignored" in caplog.text


def unusable(monkeypatch):
    """No codec can be made of any tables."""

    def refuse(self, name, anchor_bits=4, tables=None):
        if tables is not None:
            raise CodecError("another rotation")
        return get(self, name, anchor_bits)

    get = CodecCache.get
    monkeypatch.setattr(CodecCache, "get", refuse)


def test_stored_tables_that_fit_no_codec_mean_a_cold_start(
    producer, tables, tmp_path, monkeypatch, caplog
):
    store_tables(tmp_path / "producer", COMPAT, 0, 1, tables, tokens=1 << 20)
    unusable(monkeypatch)
    one = producer()
    assert one.worker.current == ""
    assert one.worker._learning.active
    assert "another rotation" in caplog.text


@pytest.mark.parametrize("stored", [True, False])
def test_tables_that_fit_no_codec_fail_the_transfer(
    warm, consumer, tables, tmp_path, monkeypatch, stored
):
    if stored:
        store_tables(tmp_path / "consumer", COMPAT, 0, 1, tables, tokens=1)
    plan = warm.plan("klt", [tables.digest])
    warm.prefill("r", TOKENS, plan)
    warm.finish("r")
    unusable(monkeypatch)
    assert "another rotation" in consumer().fetch(warm.load("r", TOKENS, plan))


def test_tables_in_use_stay_in_memory(tables, tmp_path, monkeypatch):
    monkeypatch.setattr("lynx_connector.consumer.tables.MAX_IN_MEMORY", 1)
    others = [learned(noise_cache(2048, seed), 2048) for seed in (2, 3)]
    store = TableStore(tmp_path, COMPAT, 0, 1, geometry())
    kept = ConsumerTables(store, geometry(), lambda new: None)
    kept.hold(tables.digest)
    for one in (tables, *others):
        kept.accept(one.digest, np.frombuffer(one.to_bytes(), np.uint8))
    assert kept.get(tables.digest)
    assert kept.get(others[0].digest) is None
    assert kept.known(others[0].digest)
    kept.release(tables.digest)
    assert kept.known(others[1].digest)
    assert kept.get(tables.digest) is None
