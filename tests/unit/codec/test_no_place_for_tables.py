# SPDX-License-Identifier: Apache-2.0
"""Without a home, or with one that cannot be written, Lynx works without stored tables."""

import logging
import os
import pwd
import subprocess

import pytest

from lynx_connector.codec.klt_learner import TableLearner
from lynx_connector.codec.table_store import TableStore
from lynx_connector.codec.types import KVGeometry
from lynx_connector.config import LynxConfig

GEOMETRY = KVGeometry(1, 1, 64, "float32")


@pytest.fixture(scope="module")
def tables():
    import numpy as np
    import torch
    from lynx_kernels.shared.paged import PagedKVCache, PageIndex

    page = torch.randn(64, 1, 16, 128, generator=torch.Generator().manual_seed(1))
    cache = PagedKVCache({"a": page}, 16, 1, 64, PageIndex.rows(16, 64, 128))
    learner = TableLearner(GEOMETRY)
    learner.observe(cache, np.arange(1024), 0)
    return learner.build()


@pytest.fixture
def homeless(monkeypatch):
    """A uid without a passwd entry and no HOME, as OpenShift gives."""

    def nobody(*_):
        raise KeyError("getpwuid(): uid not found")

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.setattr(pwd, "getpwnam", nobody)


def use(config, tables, caplog):
    """All that a worker does with its store; returns the warnings."""
    caplog.set_level(logging.WARNING, "vllm.lynx")
    caplog.clear()
    store = TableStore(config.tables_root(), "key", 0, 1, GEOMETRY)
    store.load_current()
    store.load("0" * 32)
    for _ in range(2):
        store.save_current(tables, 2048)
        store.save(tables)
    store.load(tables.digest)
    return [record.getMessage() for record in caplog.records]


def check_works_without(config, tables, caplog):
    warnings = use(config, tables, caplog)
    assert len(warnings) == 1, warnings
    assert "learned tables" in warnings[0]


@pytest.mark.parametrize("tables_dir", [None, "~/tables", "~nosuchuser/tables"])
def test_without_a_home(homeless, tables, caplog, tables_dir):
    config = LynxConfig.from_extra_config({"tables_dir": tables_dir} if tables_dir else {})
    assert config.tables_root() is None
    check_works_without(config, tables, caplog)


@pytest.mark.parametrize("home", ["/nonexistent/below", "/proc", "/dev/null"])
def test_a_home_that_cannot_be_written(monkeypatch, tables, caplog, home):
    if home.startswith("/nonexistent"):  # root may make it: a file stands in its way
        home = "/dev/null/below"
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", home)
    check_works_without(LynxConfig(), tables, caplog)


@pytest.mark.parametrize("cache", ["", "relative/path", "."])
def test_a_cache_folder_that_is_no_absolute_path_counts_for_nothing(monkeypatch, tmp_path, cache):
    """It would be another folder wherever a server is started."""
    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert LynxConfig().tables_root() == tmp_path / ".cache" / "lynx-connector" / "tables"


def test_a_home_in_the_cache_folder_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "~/caches")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert LynxConfig().tables_root() == tmp_path / "caches" / "lynx-connector" / "tables"


def test_a_folder_that_may_not_be_entered(monkeypatch, tables, caplog, tmp_path):
    from pathlib import Path

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)
    check_works_without(LynxConfig(tables_dir=tmp_path), tables, caplog)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mounts a tmpfs")
@pytest.mark.parametrize("options", ["size=64k,ro", "size=4k"])
def test_a_mount_that_is_read_only_or_full(tables, caplog, tmp_path, options):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", tmp_path])
    if mounted.returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        check_works_without(LynxConfig(tables_dir=tmp_path / "tables"), tables, caplog)
        assert not list(tmp_path.rglob("*.part"))
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize("trouble", [OSError(28, "No space left on device"), OSError(30, "ro")])
def test_kernels_are_compiled_where_nothing_can_be_kept(monkeypatch, trouble):
    from lynx_kernels.shared import tiles_cpu
    from numba import types

    made = []
    real = tiles_cpu.numba.njit

    def njit(signatures, cache=False, **options):
        made.append(cache)
        if cache:
            raise trouble
        return real(signatures, **options)

    def double(x):
        x[0] *= 2

    monkeypatch.setattr(tiles_cpu.numba, "njit", njit)
    kernel = tiles_cpu.compile_kernel(double, types.Array(types.int64, 1, "C"))
    assert made[0] and made[1:].count(True) == 0  # numba compiles its own in between
    import numpy as np

    values = np.ones(1, np.int64)
    kernel(values)
    assert values[0] == 2
