# SPDX-License-Identifier: Apache-2.0
"""The end of a streamed prefill: which chunks, and what they are decided by."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lynx_connector.plan import KVShape
from lynx_connector.plan.meters import PREFILL_STEPS, PREFILL_TOKENS, PrefillMeter
from lynx_connector.plan.planner import Planner
from lynx_connector.plan.taper import Pace, Unsent, next_chunk

SHAPE = KVShape(30, 3, 64)
seconds = st.floats(0, 1, allow_subnormal=False)
paces = st.builds(Pace, seconds, st.floats(0, 0.01), st.floats(1e-9, 0.01))


def chunks_of(left: int, most: int, pace: Pace, block: int) -> list[int]:
    chunks, now = [], 0.0
    unsent = Unsent(left, now)
    while left:
        before = unsent.update(left, now, pace.wire_s)
        chunks.append(next_chunk(left, most, pace, before, block))
        left -= chunks[-1]
        assert left >= 0
        now += pace.pass_s + chunks[-1] * pace.token_s
    return chunks


def whole(left: int, most: int) -> list[int]:
    return [min(most, left - start) for start in range(0, left, most)]


@given(st.integers(1, 5000), st.integers(64, 2048), paces, st.sampled_from([1, 16, 64]))
def test_the_last_byte_is_never_later_than_with_whole_chunks(left, most, pace, block):
    chunks = chunks_of(left, most, pace, block)
    assert sum(chunks) == left
    assert max(chunks) <= most
    assert pace.landed(0, chunks) <= pace.landed(0, whole(left, most)) * (1 + 1e-9)
    end = 0
    for chunk in chunks[:-1]:
        end += chunk
        assert chunk == most or chunk % block == 0


def test_the_end_gets_smaller_where_the_link_is_faster_than_the_prefill():
    pace = Pace(pass_s=0.03, token_s=0.0012, wire_s=0.00047)
    assert chunks_of(4097, 512, pace, 16) == [512] * 7 + [272, 128, 113]


@pytest.mark.parametrize(
    "pace",
    [
        pytest.param(Pace(0.03, 0.0012, 0.005), id="the link is behind anyway"),
        pytest.param(Pace(0.03, 0.0012, 0.00001), id="the last chunk travels in no time"),
        pytest.param(Pace(0.5, 0.0012, 0.00047), id="a pass costs more than it saves"),
    ],
)
def test_whole_chunks_where_smaller_ones_bring_nothing(pace):
    assert chunks_of(1024, 512, pace, 16) == [512, 512]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_only_steps_that_went_on_tell_how_long_a_token_takes():
    clock = Clock()
    meter = PrefillMeter(clock)
    assert meter.token_s(0.1) is None
    meter.step({"a": 500})
    clock.now = 1.1
    meter.step({"a": 500})
    clock.now = 100.0  # a ended: the engine may have been idle
    meter.step({"b": 500})
    clock.now = 100.2
    meter.step({"b": PREFILL_TOKENS - 1})
    clock.now = 101.0  # too few tokens to tell
    meter.step({"b": 1})
    assert meter.token_s(0.1) == pytest.approx((1.0 / 500 + 0.1 / 500) / 2)
    for _ in range(PREFILL_STEPS):
        meter.step({"c": 100})
        clock.now += 0.05  # no longer than a pass of few tokens
    meter.step({"c": 100})
    assert meter.token_s(0.1) == 0


def test_whole_chunks_until_link_and_prefill_are_measured():
    planner = Planner(False, SHAPE, "cpu")
    clock = Clock()
    planner._prefills = PrefillMeter(clock)

    def chunk(left):
        return planner.next_chunk(left, 512, 8.2, Unsent(left + 512, time.monotonic()), 16)

    assert chunk(512) == 512
    planner.step({"a": 512})
    clock.now = 0.7
    planner.step({"a": 512})
    assert chunk(512) == 512
    planner.update({0: 200.0}, {0: 30.0})
    assert chunk(512) == 256
    assert chunk(4096) == 512


def test_what_is_under_way_is_what_was_computed_less_what_the_link_took():
    unsent = Unsent(1000, 10.0)
    assert unsent.update(500, 11.0, wire_s=0.002) == 500
    assert unsent.update(400, 11.5, wire_s=0.002) == 350
    assert unsent.update(300, 99.0, wire_s=0.002) == 100
    assert unsent.update(1000, 99.1, wire_s=0.002) == pytest.approx(50)  # preempted: begins again
