# SPDX-License-Identifier: Apache-2.0
"""Back-pressure: a prefill waits for room in staging instead of failing for want of it."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lynx_connector.engine.metadata import LynxWorkerMetadata
from lynx_connector.producer.room import StagingRoom
from tests.unit.objects import PREFILL, Status, ended, filled, producer, request, step

MIB = 1 << 20


def half_with(tokens_that_fit: int, **config):
    """A producer whose staging holds this many tokens of bf16 and a half."""
    per_token = 30 * 2 * 3 * 64 * 2
    return producer(
        codec="bf16",
        staging_bytes=max(MIB, int(per_token * (tokens_that_fit + 0.5) * 1.1)),
        **config,
    )


def arrive(half, name, tokens=100):
    one = request(name, prompt=tokens, params=PREFILL)
    half.add(one)
    return one


def chunk(half, one, blocks=range(7)):
    tokens = one.num_prompt_tokens
    (work,) = filled(half, step(new=[(one.request_id, blocks, 0, tokens)])).encode
    return work.transfer_id


def dropped(half, *transfers, ranks=1):
    half.update(LynxWorkerMetadata(dropped=dict.fromkeys(transfers, ranks)))


def test_sixteen_prefills_share_room_for_three():
    half = half_with(300)
    requests = [arrive(half, f"r{i}") for i in range(16)]
    done, running = 0, []
    while done < 16:
        for one in requests:
            if half.may_start(one) and one not in running:
                running.append(one)
                one.transfer = chunk(half, one)
        assert 1 <= len(running) - done <= 3
        oldest = running[done]
        ended(half, SimpleNamespace(**vars(oldest)))
        dropped(half, oldest.transfer)
        done += 1
    assert [one.request_id for one in running] == [f"r{i}" for i in range(16)]
    assert len(half._room) == 0


def test_a_client_that_leaves_while_it_waits_gives_its_place_up():
    half = half_with(100)
    first, second, third = (arrive(half, name) for name in "abc")
    assert half.may_start(first)
    transfer = chunk(half, first)
    assert not half.may_start(second)
    assert not half.may_start(third)
    second.status = Status.FINISHED_ABORTED
    half.finish(second)
    dropped(half, transfer)
    assert half.may_start(third)


def test_a_prefill_that_was_admitted_and_never_ran_gives_its_room_back():
    half = half_with(100)
    first, second = (arrive(half, name) for name in "ab")
    assert half.may_start(first)
    first.status = Status.FINISHED_ABORTED
    half.finish(first)
    assert half.may_start(second)


def test_one_that_will_never_fit_does_not_wait_and_holds_up_nobody():
    half = half_with(100)
    small, large = arrive(half, "small"), arrive(half, "large", tokens=1000)
    assert half.may_start(large)
    assert not half.may_start(small)  # its workers have to say that they refused the large one
    dropped(half, chunk(half, large, range(63)))
    assert half.may_start(small)


def test_waiting_is_bounded_in_time():
    half = half_with(100, staging_wait_seconds=0)
    first, second = arrive(half, "a"), arrive(half, "b")
    assert half.may_start(first)
    assert half.may_start(second)


def test_every_rank_has_to_give_its_memory_back():
    half = half_with(
        100,
    )
    half._room.ranks = 2
    first, second = arrive(half, "a"), arrive(half, "b")
    assert half.may_start(first)
    transfer = chunk(half, first)
    assert not half.may_start(second)
    dropped(half, transfer)
    assert not half.may_start(second)
    dropped(half, transfer)
    assert half.may_start(second)


def test_what_is_preempted_keeps_its_room():
    half = half_with(100)
    first, second = arrive(half, "a"), arrive(half, "b")
    assert half.may_start(first)
    chunk(half, first)
    filled(half, step(preempted=["a"]))
    assert half.may_start(first)
    assert not half.may_start(second)


def test_requests_that_nobody_will_fetch_do_not_wait():
    half = half_with(100)
    assert half.may_start(arrive(half, "a"))
    other = request("plain", params=None)
    half.add(other)
    assert half.may_start(other)


@pytest.mark.parametrize("codec", ["klt", "hadamard", "bf16", "int8", "int4"])
def test_the_account_covers_what_workers_will_take(codec):
    from lynx_connector.codec import KVGeometry, get_codec
    from lynx_connector.codec.cache import CodecCache
    from lynx_connector.tiers.pieces import TierBuffers, plan_pieces

    geometry = KVGeometry(30, 3, 64, "bfloat16")
    layout = CodecCache(geometry).layout(codec, 4)
    tiered = codec in ("klt", "hadamard")
    for tier in ("residual", "exact") if tiered else ("residual",):
        half = producer(codec=codec, final_tier=tier)
        for tokens in (1, 17, 100, 4000):
            exact = tier == "exact"
            pieces = plan_pieces(
                tokens, 0, 1, 16, layout, get_codec("bf16", geometry), exact_tier=exact
            )
            taken = TierBuffers(pieces).num_bytes
            account = half._planner.staged_bytes(half._wanted(), tokens, 17)
            assert taken <= account <= 1.2 * taken


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from("ad"))))
def test_no_more_is_admitted_than_fits_and_nothing_is_forgotten(steps):
    room = StagingRoom(limit_bytes=100, ranks=1, wait_seconds=1e9)
    inside = set()
    for number, what in steps:
        name = f"t{number}"
        if what == "a" and room.admit(name, 40) is not None:
            inside.add(name)
        elif what == "d" and name in inside:
            room.dropped({name: 1})
            inside.discard(name)
        assert room.held_bytes == 40 * len(inside) <= 100
    for name in [f"t{i}" for i in range(6)]:
        room.leave(name)
    assert (len(room), room.held_bytes, room.num_waiting) == (0, 0, 0)
