# SPDX-License-Identifier: Apache-2.0
"""What is chosen, and what it is chosen from."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lynx_connector.plan import KVShape, Setting, predict
from lynx_connector.plan.meters import StepMeter
from lynx_connector.plan.modes import DEVICES, mode_of
from lynx_connector.plan.planner import Planner
from lynx_connector.plan.policy import Measured, Wanted, choose
from lynx_connector.transport.rate import TRUSTED_BYTES, RateMeter

SHAPE = KVShape(30, 3, 64)
wanted_plans = st.builds(
    lambda codec, bits, tier: Wanted(codec, bits if codec == "klt" else 4, tier),
    st.sampled_from(["klt", "hadamard", "bf16", "int8", "int4"]),
    st.integers(3, 5),
    st.sampled_from(["residual", "exact"]),
)


@given(
    wanted_plans,
    st.integers(1, 50_000),
    st.floats(1, 1e6),
    st.floats(1, 500),
    st.integers(1, 16),
    st.sampled_from(["cpu", "gpu"]),
)
def test_choice_is_as_fast_as_any_and_never_a_worse_cache(
    wanted, tokens, link, step, flying, device
):
    choice = choose(wanted, SHAPE, tokens, Measured(link, step), in_flight=flying, device=device)
    assert choice.final_tier == wanted.final_tier
    assert choice.codec in (wanted.codec, "bf16")
    assert 0 <= choice.draft_limit <= 64

    def seconds(codec, bits):
        costs = DEVICES[device]
        setting = Setting(
            SHAPE,
            tokens,
            link / flying,
            step,
            codec_gb_s=costs.codec_gb_s,
            verify_cost=costs.verify_cost,
        )
        mode = mode_of(codec, SHAPE, anchor_bits=bits, exact=wanted.final_tier == "exact")
        return predict(setting, mode).token_s(32)

    chosen = seconds(choice.codec, choice.anchor_bits)
    bits = (3, 4, 5) if wanted.codec == "klt" else (4,)
    for other in [("bf16", 4), *((wanted.codec, width) for width in bits)]:
        assert chosen <= seconds(*other) * 1.0101


def test_slow_links_get_drafts_and_fast_ones_a_plain_copy():
    wanted = Wanted("hadamard", 4, "residual")
    slow = choose(wanted, SHAPE, 4096, Measured(100, 60), device="cpu")
    fast = choose(wanted, SHAPE, 4096, Measured(100_000, 60), device="cpu")
    assert (slow.name, fast.name) == ("hadamard", "bf16")
    assert "100 Mbit/s" in slow.why
    assert "assumed" in choose(wanted, SHAPE, 4096, Measured(100)).why


def test_requests_in_flight_share_the_link():
    wanted = Wanted("hadamard", 4, "residual")
    measured = Measured(8000, 60)
    assert choose(wanted, SHAPE, 4096, measured, device="cpu").name == "bf16"
    assert choose(wanted, SHAPE, 4096, measured, in_flight=16, device="cpu").name == "hadamard"


def test_as_configured_while_nothing_is_measured(caplog):
    planner = Planner(True, SHAPE, "gpu")
    with caplog.at_level("INFO", "vllm.lynx.plan"):
        choice = planner.plan("r7", Wanted("klt", 5, "exact"), 4096, 1)
    assert (choice.name, choice.anchor_bits, choice.draft_limit) == ("klt5+exact", 5, 0)
    assert "request r7: plan klt5+exact: no link rate measured" in caplog.text


def test_a_configured_limit_bounds_what_was_measured():
    planner = Planner(True, SHAPE, "gpu", limit_mbit=50)
    planner.update({0: 90_000.0}, {0: 20.0})
    assert planner.measured == Measured(50, 20.0)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_rate_counts_busy_time_once_and_only_that():
    clock = Clock()
    meter = RateMeter(clock)
    size = TRUSTED_BYTES // 2
    for start in (0.0, 50.0):  # a long pause between two pairs of overlapping sends
        for end in (start + 1, start + 2):
            clock.now = end
            meter.sent("p", size, began=start)
    assert meter.mbit == pytest.approx(size * 8e-6)


def test_rate_needs_a_megabyte_and_takes_the_slowest_recent_peer():
    clock = Clock()
    meter = RateMeter(clock)
    clock.now = 1.0
    meter.sent("slow", TRUSTED_BYTES - 1, began=0.0)
    assert meter.mbit == 0
    meter.sent("fast", 10 * TRUSTED_BYTES, began=0.0)
    clock.now = 2.0
    assert meter.mbit == pytest.approx(10 * TRUSTED_BYTES * 8e-6)
    meter.sent("slow", TRUSTED_BYTES + 1, began=1.0)
    assert meter.mbit == pytest.approx(TRUSTED_BYTES * 8e-6, rel=0.2)
    clock.now = 10_000.0
    assert meter.mbit == 0


def test_rate_follows_a_link_that_changes():
    clock = Clock()
    meter = RateMeter(clock)
    for seconds in [0.1] * 50 + [1.0] * 15:
        clock.now += seconds
        meter.sent("p", TRUSTED_BYTES, began=clock.now - seconds)
    assert meter.mbit == pytest.approx(TRUSTED_BYTES * 8e-6, rel=0.1)


def test_step_time_is_that_of_decode_steps_without_idle_time():
    clock = Clock()
    meter = StepMeter(clock)
    for _ in range(6):
        meter.step({"a": 1, "b": 1})
        clock.now += 0.05
    meter.step({"a": 1, "new": 512})  # a prefill
    clock.now += 3.0
    meter.step({"a": 1})
    clock.now += 100.0  # idle: a is gone
    meter.step({"c": 1})
    assert meter.step_ms == pytest.approx(50)


def test_step_time_is_unknown_at_first():
    meter = StepMeter(Clock())
    meter.step({"a": 1})
    meter.step({"a": 1})
    assert meter.step_ms == 0
