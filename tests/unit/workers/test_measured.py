# SPDX-License-Identifier: Apache-2.0
"""A transfer over real UCX tells the producer its link's rate and the decode step time."""

import pytest

from .worker_pair import changed


def test_a_transfer_is_measured_and_reported_once(producer, consumer):
    one, other = producer(link_mbit=40), consumer()
    assert one.worker.take_measured() == ({}, {})
    one.prefill("r", 2000, plan := one.plan("bf16"))
    load = one.load("r", 2000, plan)
    assert other.fetch(changed(load, step_ms=61.5)) is None
    one.finish("r")
    link, step = one.worker.take_measured()
    assert step == {0: 61.5}
    assert link[0] == pytest.approx(40, rel=0.25)
    assert one.worker.take_measured() == ({}, {})
