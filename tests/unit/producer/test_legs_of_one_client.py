# SPDX-License-Identifier: Apache-2.0
"""Of n answers and of a list of prompts the prefill stages what its reply can name, and no more."""

import pytest

from lynx_connector.engine.requests import Member, member
from tests.unit.objects import PREFILL, Status, filled, producer, request, step


@pytest.mark.parametrize(
    ("request_id", "place"),
    [
        ("cmpl-7-0-0123abcd", ("cmpl-7", 0, None)),
        ("cmpl-7-12-0123abcd", ("cmpl-7", 12, None)),
        ("3_cmpl-7-12-0123abcd", ("cmpl-7", 12, 3)),
        ("1_chatcmpl-a-b-0123abcd", ("chatcmpl-a-b", 0, 1)),
        ("chatcmpl-7-1-0123abcd", ("chatcmpl-7-1", 0, None)),
        ("cmpl-___prefill_addr_h:1___decode_addr_h:2_ab-1-0123abcd",
         ("cmpl-___prefill_addr_h:1___decode_addr_h:2_ab", 1, None)),
        ("anything", ("anything", 0, None)),
        ("", ("", 0, None)),
    ],
)  # fmt: skip
def test_ids_say_what_came_together(request_id, place):
    assert member(request_id) == Member(*place)


def leg(half, name):
    one = request(name, params=PREFILL)
    half.add(one)
    return one


def run(half, one):
    return filled(half, step(new=[(one.request_id, range(7), 0, 100)])).encode


@pytest.mark.parametrize("last", [0, 1, 2])
def test_of_n_one_is_staged_and_every_reply_names_it(last):
    half = producer()
    legs = [leg(half, f"{i}_chatcmpl-7-0123abcd") for i in range(3)]
    assert len(run(half, legs[0])) == 1
    assert half.reply_early(legs[0]) is None
    assert run(half, legs[1]) == run(half, legs[2]) == []
    assert all(half.may_start(one) for one in legs)
    order = [0, 1, 2] if last == 2 else [0, 2, 1]
    replies = {index: half.finish(legs[index])[1] for index in order}
    assert len({reply["remote_request_id"] for reply in replies.values()}) == 1
    assert half.num_prefills == 0


def test_of_a_list_the_first_is_staged():
    half = producer()
    legs = [leg(half, f"cmpl-7-{i}-0123abc{i}") for i in range(3)]
    assert [len(run(half, one)) for one in legs] == [1, 0, 0]
    replies = [half.finish(one) for one in legs]
    assert replies[0][1]["do_remote_prefill"]
    assert replies[1:] == [(False, None)] * 2


def test_when_the_first_of_n_fails_nothing_is_named():
    half = producer()
    first, second = (leg(half, f"{i}_chatcmpl-7-0123abcd") for i in range(2))
    first.status = Status.FINISHED_ABORTED
    assert half.finish(first)[1] is None
    assert half.finish(second) == (False, None)


def test_replies_that_are_kept_are_bounded(monkeypatch):
    monkeypatch.setattr("lynx_connector.producer.siblings.MAX_KEPT", 2)
    half = producer()
    for number in range(5):
        one = leg(half, f"0_chatcmpl-{number}-0123abcd")
        run(half, one)
        half.finish(one)
    assert len(half._siblings._replies) == 2
