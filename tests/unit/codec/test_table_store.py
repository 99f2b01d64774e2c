# SPDX-License-Identifier: Apache-2.0
"""The tables folder: what is written is read again, and nothing that is broken stops a start."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lynx_kernels.shared.paged import PagedKVCache, PageIndex

from lynx_connector.codec import KVGeometry
from lynx_connector.codec import table_store as module
from lynx_connector.codec.klt_learner import TableLearner
from lynx_connector.codec.table_store import TableStore, store_tables, tables_folder

GEOMETRY = KVGeometry(1, 1, 64, "float32")
COMPAT = "c" * 32


def make_tables(seed):
    torch.manual_seed(seed)
    index = PageIndex.rows(16, 64, 128)
    cache = PagedKVCache({"l": torch.randn(64, 1, 16, 128)}, 16, 1, 64, index)
    learner = TableLearner(GEOMETRY)
    learner.observe(cache, np.random.default_rng(seed).permutation(1024)[: 1000 + seed], 0)
    return learner.build()


@pytest.fixture(scope="module")
def tables():
    return make_tables(0)


@pytest.fixture
def store(tmp_path):
    return TableStore(tmp_path, COMPAT, 0, 2, GEOMETRY)


def test_nothing_there(store):
    assert store.load_current() is None
    assert store.load("0" * 32) is None


def test_current_tables_survive(store, tables, tmp_path):
    path = store_tables(tmp_path, COMPAT, 0, 2, tables, tokens=4096)
    assert path == tables_folder(tmp_path, COMPAT, 0, 2) / f"{tables.digest}.tables"
    assert path.parent.name == "rank0-of-2"
    found, tokens = store.load_current()
    assert (found.to_bytes(), tokens) == (tables.to_bytes(), 4096)
    other_rank = TableStore(tmp_path, COMPAT, 1, 2, GEOMETRY)
    assert other_rank.load(tables.digest) is None


def test_saving_does_not_change_what_a_producer_begins_with(store, tables):
    store.save(tables)
    assert store.load(tables.digest).digest == tables.digest
    assert store.load_current() is None


@pytest.mark.parametrize("digest", ["../../etc/passwd", "", "G" * 32, "0" * 32 + "/x"])
def test_digests_never_leave_the_folder(store, digest):
    assert store.load(digest) is None


@settings(max_examples=30, deadline=None)
@given(where=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_any_flipped_byte_is_noticed(tmp_path_factory, tables, where, flip):
    root = tmp_path_factory.mktemp("store")
    path = store_tables(root, COMPAT, 0, 1, tables, tokens=1)
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] ^= flip
    path.write_bytes(bytes(data))
    assert TableStore(root, COMPAT, 0, 1, GEOMETRY).load(tables.digest) is None


@pytest.mark.parametrize("damage", [b"", b"junk", b"\0" * 100])
def test_damaged_files_are_named_once(store, tables, tmp_path, caplog, damage):
    path = store_tables(tmp_path, COMPAT, 0, 2, tables, tokens=1)
    path.write_bytes(damage)
    assert store.load_current() is None
    assert store.load(tables.digest) is None
    assert len([r for r in caplog.records if str(path) in r.getMessage()]) == 1


def test_tables_of_another_shape(tables, tmp_path, caplog):
    path = store_tables(tmp_path, COMPAT, 0, 1, tables, tokens=1)
    wider = TableStore(tmp_path, COMPAT, 0, 1, KVGeometry(2, 1, 64, "float32"))
    assert wider.load_current() is None
    assert str(path) in caplog.text


def test_folder_that_cannot_be_written(tables, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    store = TableStore(tmp_path / "file", COMPAT, 0, 1, GEOMETRY)
    store.save(tables)
    store.save_current(tables, 1)
    assert len(caplog.records) == 1
    assert "cannot be written" in caplog.text
    with pytest.raises(OSError):
        store_tables(tmp_path / "file", COMPAT, 0, 1, tables, tokens=1)


def test_an_interrupted_write_leaves_the_old_file(store, tables, tmp_path, monkeypatch):
    store_tables(tmp_path, COMPAT, 0, 2, tables, tokens=7)
    newer = make_tables(1)
    monkeypatch.setattr(module.os, "replace", lambda *a: (_ for _ in ()).throw(OSError("full")))
    store.save_current(newer, 8)
    assert store.load_current()[1] == 7
    assert not list(store.folder.glob(".*.part"))


def test_old_versions_are_deleted_but_not_the_current_one(store, tables, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_FILES", 2)
    store_tables(tmp_path, COMPAT, 0, 2, tables, tokens=1)
    path = store.folder / f"{tables.digest}.tables"
    module.os.utime(path, (1, 1))
    for seed in range(1, 5):
        store.save(make_tables(seed))
    assert path.exists()
    assert len(list(store.folder.glob("*.tables"))) <= 3
