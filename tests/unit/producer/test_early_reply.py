# SPDX-License-Identifier: Apache-2.0
"""Both scheduler halves around an early reply."""

import pytest

from lynx_connector.engine.metadata import LynxWorkerMetadata
from lynx_connector.wire.handoff import parse_handoff, prompt_digest
from tests.unit.objects import (
    BLOCK,
    PREFILL,
    SHAPE,
    Status,
    admit,
    consumer,
    ended,
    filled,
    handoff,
    producer,
    request,
    running,
    step,
)


def test_a_prefill_is_answered_once_after_its_first_step():
    half = producer()
    one = request(params=PREFILL)
    half.add(one)
    assert half.take_answerable(["r"]) == []  # not scheduled: no worker knows its transfer
    filled(half, step(new=[("r", range(4), 0, 50)]))
    assert half.take_answerable(["other", "r"]) == ["r"]
    reply = half.reply_early(one)
    assert half.take_answerable(["r"]) == []
    lynx = parse_handoff(reply).lynx
    assert (lynx.early, lynx.num_tokens, lynx.prompt) == (True, 100, prompt_digest(range(100)))


def test_the_end_of_an_answered_prefill_goes_to_its_consumer():
    half = producer()
    one = running(half)
    half.reply_early(one)
    delay, reply, metadata = ended(half, one)
    assert (delay, reply, metadata.dropped) == (True, None, [])
    (outcome,) = metadata.outcomes
    assert (outcome.request_id, outcome.cause) == ("r", "")
    assert filled(half, step()).outcomes == []


def test_the_failure_of_an_answered_prefill_goes_to_its_consumer():
    half = producer()
    one = running(half)
    half.reply_early(one)
    delay, reply, metadata = ended(half, one, Status.FINISHED_ABORTED)
    assert (delay, reply) == (True, None)
    (outcome,) = metadata.outcomes
    assert "FINISHED_ABORTED" in outcome.cause
    assert outcome.first_token is None


def test_only_an_answered_prefill_ends_in_smaller_chunks(monkeypatch):
    half = producer()
    mbit = SHAPE.elements_per_token * 8.2 / 500  # half a millisecond a token
    half.update(LynxWorkerMetadata(link_mbit={0: mbit}, step_ms={0: 30.0}))
    monkeypatch.setattr(half._planner._prefills, "token_s", lambda pass_s: 0.0012)
    one = request(params=PREFILL, prompt=2000)
    half.add(one)
    assert half.next_chunk("r", 1000, 1024) == 1024
    filled(half, step(new=[("r", range(2000 // BLOCK), 0, 1000)]))
    assert half.next_chunk("r", 1000, 1024) == 1024
    half.reply_early(one)
    assert half.next_chunk("r", 1000, 1024) == 512
    assert half.next_chunk("other", 1000, 1024) == 1024


def test_every_step_is_timed_for_the_end_of_a_prefill():
    half = producer()
    half.add(request(params=PREFILL, prompt=2000))
    filled(half, step(new=[("r", range(2000 // BLOCK), 0, 1000)]))
    assert half._planner._prefills.token_s(0.0) is None
    filled(half, step(cached=[("r", None, 1000, 1000)]))
    assert half._planner._prefills.token_s(0.0) > 0


@pytest.mark.parametrize("fields", [{"max_tokens": 2}, {"resumable": True}])
def test_requests_with_more_to_say_are_answered_at_their_end(fields):
    half = producer()
    one = running(half, **fields)
    assert half.reply_early(one) is None
    _, reply, metadata = ended(half, one)
    assert not parse_handoff(reply).lynx.early
    assert not metadata.outcomes


def test_early_reply_can_be_switched_off():
    half = producer(early_reply=False)
    one = running(half)
    assert half.take_answerable(["r"]) == []
    assert not parse_handoff(ended(half, one)[1]).lynx.early


def test_only_answered_prefills_are_given_up_when_their_transfer_is_released():
    half = producer()
    answered, waiting = running(half, "a"), running(half, "b")
    half.reply_early(answered)
    half.update(LynxWorkerMetadata(unwanted={"a", "b", "gone"}))
    assert half.take_unwanted() == ["a"]
    assert half.take_unwanted() == []
    assert parse_handoff(ended(half, waiting)[1])


def test_blocks_of_requests_that_wait_for_a_prefill_are_bounded():
    """Of 100 tokens each, 250 may be held: the third waits, and the fourth behind it."""
    half = consumer(waiting=250)
    names = ["a", "b", "c", "d"]
    ones = [request(n, params=handoff(early=True) | {"remote_request_id": n}) for n in names]
    for one in ones:
        half.add(one)
    assert [admit(half, one)[0] for one in ones[:2]] == [100, 100]
    assert [half.match(one, 0) for one in ones[2:]] == [(None, False)] * 2
    half.received({"a"})
    assert half.match(ones[3], 0) == (None, False)  # not before its turn
    assert admit(half, ones[2])[0] == 100
    half.finish(ones[1])
    assert admit(half, ones[3])[0] == 100


def test_requests_whose_prefill_is_over_are_not_counted():
    half = consumer(waiting=100)
    for name in ("a", "b", "c"):
        one = request(name, params=handoff() | {"remote_request_id": name})
        half.add(one)
        assert admit(half, one)[0] == 100


def test_a_prompt_larger_than_the_bound_enters_alone():
    half = consumer(waiting=10)
    one = request(params=handoff(early=True))
    half.add(one)
    assert admit(half, one)[0] == 100


def test_another_prompt_of_the_same_length_is_refused():
    half = consumer()
    one = request(params=handoff(prompt=prompt_digest([1] * 100)))
    half.add(one)
    assert admit(half, one)[0] == 0
    assert half._decodes["r"].failure.startswith("prefill computed another prompt")
