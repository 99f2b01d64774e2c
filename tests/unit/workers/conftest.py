# SPDX-License-Identifier: Apache-2.0
"""Workers that are stopped, and checked for what they left, after every test."""

import pytest

from .worker_pair import Consumer, Producer, until


@pytest.fixture
def producer(ucx_loop, tmp_path):
    made = []

    def make(folder="producer", **options):
        made.append(Producer(ucx_loop, tmp_path / folder, **options))
        return made[-1]

    yield make
    for one in made:
        until(lambda one=one: one.worker._store.used_bytes == 0 and len(one.worker._store) == 0)
        one.close()


@pytest.fixture
def consumer(ucx_loop, tmp_path):
    made = []

    def make(folder="consumer", **options):
        made.append(Consumer(ucx_loop, tmp_path / folder, **options))
        return made[-1]

    yield make
    for one in made:
        until(lambda one=one: one.idle)
