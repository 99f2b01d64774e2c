# SPDX-License-Identifier: Apache-2.0
"""The laws of the model, and the paper's table."""

import dataclasses
import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lynx_connector.codec import KVGeometry, get_codec
from lynx_connector.codec.klt import KltCodec
from lynx_connector.plan import FirstToken, KVShape, Mode, PlanError, Setting, paper, predict
from lynx_connector.plan.crossings import best_mode, crossings
from lynx_connector.plan.model import expected_accepted
from lynx_connector.plan.modes import acceptance_of, mode_of

SHAPE = KVShape(30, 3, 64)
rates = st.floats(1, 1e6)
settings_ = st.builds(
    Setting,
    st.just(SHAPE),
    st.integers(1, 100_000),
    rates,
    st.floats(1, 500),
    st.one_of(st.none(), st.floats(10, 1e5)),
    chunk_tokens=st.integers(16, 8192),
    codec_gb_s=st.floats(0.1, 1000),
    verify_cost=st.floats(0, 0.5),
    draft_limit=st.integers(0, 200),
)
lynx_modes = st.builds(
    lambda bits, drafts, acceptance, first, streamed: Mode(
        "m", (bits + 0.125, 8 - bits), drafts, acceptance, first, streamed
    ),
    st.integers(3, 5),
    st.booleans(),
    st.floats(0, 0.999),
    st.sampled_from([FirstToken.FINAL_CACHE, FirstToken.HANDOVER]),
    st.booleans(),
)
modes = st.one_of(
    lynx_modes, st.sampled_from([mode_of(name, SHAPE) for name in ("bf16", "int8", "int4")])
)


@given(settings_, modes, rates, st.integers(1, 200))
def test_a_faster_link_is_never_later(setting, mode, other, token):
    slow, fast = sorted((setting.link_mbit, other))
    later = predict(dataclasses.replace(setting, link_mbit=slow), mode).token_s(token)
    assert predict(dataclasses.replace(setting, link_mbit=fast), mode).token_s(token) <= (
        later * (1 + 1e-9)
    )


@given(settings_, modes, st.integers(1, 100_000), st.integers(1, 200))
def test_more_tokens_are_never_sooner(setting, mode, other, token):
    few, many = sorted((setting.tokens, other))
    sooner = predict(dataclasses.replace(setting, tokens=few), mode).token_s(token)
    assert predict(dataclasses.replace(setting, tokens=many), mode).token_s(token) >= (
        sooner * (1 - 1e-9)
    )


@given(settings_, modes, st.integers(1, 200))
def test_tokens_come_in_order_and_drafts_stay_within_their_limit(setting, mode, token):
    found = predict(setting, mode)
    assert found.token_s(token) <= found.token_s(token + 1)
    assert 0 <= found.accepted <= found.drafted <= setting.draft_limit
    assert found.anchor_s <= found.final_s <= found.verified_s


@given(settings_)
def test_streaming_and_handover_never_cost(setting):
    plain = mode_of("hadamard", SHAPE)
    streamed = dataclasses.replace(plain, streamed=True)
    handed = dataclasses.replace(plain, first_token=FirstToken.HANDOVER)
    base = predict(setting, plain)
    assert predict(setting, streamed).final_s <= base.final_s * (1 + 1e-9)
    assert predict(setting, handed).first_s <= base.first_s
    assert predict(setting, handed).token_s(32) <= base.token_s(32)


def test_a_blocking_transfer_by_hand():
    setting = Setting(SHAPE, 1000, link_mbit=8 * 23.04, step_ms=50, prefill_tokens_s=500)
    found = predict(setting, mode_of("bf16", SHAPE))
    assert found.first_s == pytest.approx(2 + 1 + 0.05)  # prefill, 23.04 MB at 23.04 MB/s, a step
    assert found.token_s(3) == pytest.approx(3.15)


def test_the_papers_lynx_row_from_its_other_rows():
    """Link, step and overhead come from the INT8 and BF16 rows alone."""
    setting = paper.fit()
    for name in ("INT8", "BF16"):
        found = predict(setting, paper.modes()[name])
        assert found.first_s == pytest.approx(paper.PUBLISHED[name].first_s)
        assert found.token_s(32) == pytest.approx(paper.PUBLISHED[name].later_s)
    found = predict(setting, paper.modes()["Lynx"])
    assert found.first_s == pytest.approx(1.6, rel=0.10)
    assert found.token_s(32) == pytest.approx(3.4, rel=0.10)
    assert found.drafted == pytest.approx(21.43, rel=0.05)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", ["bf16", "int8", "int4", "hadamard"])
def test_widths_are_the_codecs_own(name, head_dim):
    codec = get_codec(name, KVGeometry(2, 2, head_dim, "bfloat16"))
    mode = mode_of(name, KVShape(2, 2, head_dim))
    assert list(mode.tier_bits) == [codec.bits_per_element([tier]) for tier in codec.tiers]


@pytest.mark.parametrize("bits", [3, 4, 5])
def test_widths_of_klt(bits):
    geometry = KVGeometry(2, 2, 64, "bfloat16")
    widths = KltCodec.row_widths(geometry, bits).values()
    mode = mode_of("klt", KVShape(2, 2, 64), anchor_bits=bits)
    assert list(mode.tier_bits) == [8 * width / geometry.elements_per_token for width in widths]


@given(st.floats(0.5, 100), st.floats(0, 0.99))
def test_acceptance_is_found_again(drafted, share):
    acceptance = acceptance_of(share * drafted, drafted)
    # Fractions of a draft can be accepted beyond p * n, never beyond n.
    assert expected_accepted(acceptance, drafted) == pytest.approx(share * drafted, abs=1e-3)


def test_crossings_are_where_the_best_mode_changes():
    setting = Setting(SHAPE, 4096, 1, 60, codec_gb_s=1, verify_cost=0.045)
    among = [mode_of(name, SHAPE) for name in ("bf16", "int8", "hadamard")]
    stretches = crossings(setting, among, 32, 1, 1e6)
    assert stretches[0].from_mbit == 1
    assert stretches[-1].mode == "bf16"
    assert len({s.mode for s in stretches}) > 1
    for before, after in itertools.pairwise(stretches):
        for factor, name in ((0.999, before.mode), (1.001, after.mode)):
            here = dataclasses.replace(setting, link_mbit=after.from_mbit * factor)
            assert best_mode(here, among, 32).name == name


@pytest.mark.parametrize(
    "name", ["tokens", "link_mbit", "step_ms", "prefill_tokens_s", "codec_gb_s", "chunk_tokens"]
)
@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_impossible_numbers_are_named(name, value):
    good = {"shape": SHAPE, "tokens": 10, "link_mbit": 10, "step_ms": 10}
    with pytest.raises(PlanError, match=name):
        Setting(**good | {name: value})


@pytest.mark.parametrize("name", ["layers", "kv_heads", "head_dim"])
def test_impossible_shapes_are_named(name):
    with pytest.raises(PlanError, match=name):
        KVShape(**{"layers": 1, "kv_heads": 1, "head_dim": 64} | {name: 0})
    with pytest.raises(PlanError, match="tensor_parallel_size = 2"):
        KVShape(1, 3, 64).shard(2)
    assert KVShape(1, 2, 64).shard(4).kv_heads == 1
