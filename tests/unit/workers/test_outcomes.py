# SPDX-License-Identifier: Apache-2.0
"""How a prefill ended after its early reply, from one worker's metadata to the other's report."""

import pytest

from lynx_connector.engine.metadata import LynxMetadata, PrefillOutcome

from .worker_pair import until

TOKENS = 700


def chunks_but_the_last(one, plan):
    """The first of two chunks is encoded; returns how to submit the other."""
    chunks = []
    submit, one.worker.submit = one.worker.submit, chunks.append
    one.prefill("r", TOKENS, plan, chunk=400)
    one.worker.submit = submit
    submit(chunks[0])
    return lambda: submit(chunks[1])


def settle(one, first_token, cause=""):
    outcome = PrefillOutcome("r", "t-r", first_token, cause)
    one.worker.apply_drops(LynxMetadata(outcomes=[outcome]))


def test_first_token_comes_before_the_last_rows(producer, consumer):
    one, other = producer(), consumer()
    plan = one.plan()
    finish = chunks_but_the_last(one, plan)
    other.step(loads=[one.load("r", TOKENS, plan)])
    settle(one, 42)
    until(lambda: other.step() or other.first_tokens)
    assert other.first_tokens == {"r": 42}
    assert not other.received
    finish()
    assert other.settle("r") is None
    one.finish("r")
    until(lambda: one.worker._store.used_bytes == 0)


@pytest.mark.parametrize("fetched", [True, False])
def test_prefill_that_failed_ends_the_transfer_with_its_cause(producer, consumer, fetched):
    one, other = producer(), consumer()
    plan = one.plan()
    chunks_but_the_last(one, plan)
    load = one.load("r", TOKENS, plan)
    if fetched:
        other.step(loads=[load])
    settle(one, None, "prefill was aborted")
    cause = other.settle("r") if fetched else other.fetch(load)
    assert "prefill was aborted" in cause
    assert not other.first_tokens
    one.finish("r")
    until(lambda: one.worker._store.used_bytes == 0 and other.idle)


def test_only_the_first_rank_carries_the_token(producer):
    one = producer()
    chunks_but_the_last(one, one.plan())
    one.worker.rank = 1
    settle(one, 42)
    assert one.worker._store.lookup("t-r").outcome is None
    settle(one, None, "prefill was aborted")
    assert one.worker._store.used_bytes == 0
