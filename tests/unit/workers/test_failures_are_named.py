# SPDX-License-Identifier: Apache-2.0
"""One log line and one event a failure: request, peer, cause and remedy."""

import pytest

from .worker_pair import Consumer, Producer, changed


@pytest.fixture
def load(ucx_loop, tmp_path):
    producer = Producer(ucx_loop, tmp_path / "producer", codec="hadamard")
    producer.prefill("r", 100, producer.plan())
    yield producer.load("r", 100, producer.plan())
    producer.finish("r")
    producer.close()


@pytest.fixture
def other(ucx_loop, tmp_path):
    return Consumer(ucx_loop, tmp_path / "consumer")


def lines(caplog):
    return [record.getMessage() for record in caplog.records if "KV transfer" in record.message]


def test_a_failed_transfer_is_logged_once(other, load, caplog):
    assert "unknown transfer" in other.fetch(changed(load, transfer_id="x"))
    (line,) = lines(caplog)
    assert line.startswith(f"lynx: request r: KV transfer from {load.host} failed: ")
    assert "unknown transfer (the prefill has restarted" in line
    assert len(other.events.named("failed")) == 1


@pytest.mark.parametrize(("rank", "told"), [(0, 1), (1, 0)])
def test_what_the_scheduler_half_knows_is_told_by_one_rank(other, load, caplog, rank, told):
    other.worker.rank = rank
    cause = "prefill speaks Lynx protocol 1, this instance 4"
    other.step(loads=[changed(load, transfer_id="", failure=cause)])
    assert "r" in other.failed
    assert len(lines(caplog)) == len(other.events.named("failed")) == told
