# SPDX-License-Identifier: Apache-2.0
"""The exact tier's coder: any bits come back, both implementations agree, no bytes break it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lynx_kernels.exact import cpu as exact_cpu
from lynx_kernels.exact import reference as exact
from lynx_kernels.exact.code import (
    BIAS,
    MANTISSA,
    SLOTS,
    WIDTH,
    exact_code,
    lanes_of,
    plans,
)
from lynx_kernels.shared.error_steps import NO_ERROR, error_steps

KINDS = [0, 1, 2]  # bfloat16, float16, float32
HEADER = 8


@st.composite
def tokens(draw, kind):
    """True and coarse bits, spread and tilt: near each other, or of no relation at all."""
    shape = draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(st.sampled_from([1, 8, 24, 64]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    word = np.uint16 if WIDTH[kind] == 16 else np.uint32
    size = shape[0], shape[1] * shape[2]
    coarse = rng.integers(0, 1 << WIDTH[kind], size).astype(word)
    reach = draw(st.sampled_from([0, 1, 30, 3000, 1 << WIDTH[kind]]))
    true = (coarse + rng.integers(-reach, reach + 1, size)).astype(word)
    special = draw(st.lists(st.sampled_from([0, 1 << WIDTH[kind] - 1, 1]), max_size=3))
    true.reshape(-1)[: len(special)] = special[: true.size]
    sigma = draw(st.sampled_from([(-300, 300), (-60, 20), (NO_ERROR, NO_ERROR + 1)]))
    spread = rng.integers(*sigma, shape[:2]).astype(np.int16)
    tilt = rng.integers(-9, 9, shape[1:]).astype(np.int16)
    return true, coarse, spread, tilt


def sigma_of(spread, tilt):
    return (spread[:, :, None] + tilt).reshape(len(spread), -1).astype(np.int16)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_bits_come_back_and_both_implementations_agree(kind, data):
    true, coarse, spread, tilt = data.draw(tokens(kind))
    expected = exact.encode(true, coarse, sigma_of(spread, tilt), kind)
    stream, lengths = exact_cpu.encode(true, coarse, spread, tilt, kind, HEADER)
    behind = np.zeros(HEADER, np.uint8)
    assert lengths.tolist() == [HEADER + len(token) for token in expected]
    np.testing.assert_array_equal(
        stream, np.concatenate([part for token in expected for part in (behind, token)])
    )
    decoded = exact_cpu.decode(stream, lengths, coarse, spread, tilt, kind, HEADER)
    np.testing.assert_array_equal(decoded, true)
    decoded = exact.decode(expected, coarse, sigma_of(spread, tilt), kind)
    np.testing.assert_array_equal(decoded, true)


@pytest.mark.parametrize("kind", KINDS)
def test_many_lanes(kind):
    """Over 65,536 elements a token: 32 lanes."""
    rng = np.random.default_rng(kind)
    word = np.uint16 if WIDTH[kind] == 16 else np.uint32
    coarse = rng.integers(0, 1 << WIDTH[kind], (2, 520 * 128)).astype(word)
    true = (coarse + rng.integers(-40, 40, coarse.shape)).astype(word)
    spread = rng.integers(-400, 400, (2, 520)).astype(np.int16)
    tilt = np.zeros((520, 128), np.int16)
    assert lanes_of(coarse.shape[1]) == 32
    stream, lengths = exact_cpu.encode(true, coarse, spread, tilt, kind, 0)
    expected = exact.encode(true, coarse, sigma_of(spread, tilt), kind)
    np.testing.assert_array_equal(stream, np.concatenate(expected))
    np.testing.assert_array_equal(
        exact_cpu.decode(stream, lengths, coarse, spread, tilt, kind, 0), true
    )


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_wrong_bytes_are_refused_or_decode_to_something(kind, data):
    """No checksum here: what cannot be told apart decodes, nothing else happens."""
    true, coarse, spread, tilt = data.draw(tokens(kind))
    stream, lengths = exact_cpu.encode(true, coarse, spread, tilt, kind, HEADER)
    if data.draw(st.booleans()):
        for place in data.draw(st.lists(st.integers(0, len(stream) - 1), min_size=1, max_size=9)):
            stream[place] ^= data.draw(st.integers(1, 255))
    else:
        cut = 2 * data.draw(st.integers(0, (int(lengths[-1])) // 2 - 1))
        lengths[-1] -= cut + 2
        stream = stream[: len(stream) - cut - 2]
    try:
        decoded = exact_cpu.decode(stream, lengths, coarse, spread, tilt, kind, HEADER)
    except ValueError:
        return
    assert decoded.shape == true.shape


def test_bytes_behind_the_end_are_refused():
    coarse = np.arange(64, dtype=np.uint16).reshape(1, 64)
    spread, tilt = np.zeros((1, 1), np.int16), np.zeros((1, 64), np.int16)
    stream, lengths = exact_cpu.encode(coarse + 1, coarse, spread, tilt, 0, 0)
    with pytest.raises(ValueError, match="last element"):
        exact_cpu.decode(np.append(stream, [0, 0]).astype(np.uint8), lengths + 2, coarse, spread,
                         tilt, 0, 0)  # fmt: skip
    with pytest.raises(ValueError, match="odd"):
        exact_cpu.decode(stream[:-1], lengths - 1, coarse, spread, tilt, 0, 0)
    with pytest.raises(ValueError, match="add up"):
        exact_cpu.decode(stream[:-2], lengths, coarse, spread, tilt, 0, 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("octaves", [-3, 0, 1, 2.5, 4])
def test_bits_are_close_to_the_entropy_of_the_error(kind, octaves):
    """Gaussian errors of 2^octaves ulp cost what an ideal code of their frequencies would."""
    rng = np.random.default_rng(3)
    sigma = 2.0**octaves
    elements, mantissa = 8192, MANTISSA[kind]
    word = np.uint16 if WIDTH[kind] == 16 else np.uint32
    base = BIAS[kind] << mantissa  # 1.0 and up, in the middle of a binade
    exact_value = rng.uniform(0.4, 0.6, (8, elements)) * 2.0**mantissa
    coarse = (base + np.rint(exact_value)).astype(word)
    true = (base + np.rint(exact_value + rng.normal(0, sigma, coarse.shape))).astype(word)
    steps = round(8 * (octaves - mantissa))
    spread = np.full((8, elements // 64), steps, np.int16)
    tilt = np.zeros((elements // 64, 64), np.int16)
    stream, _ = exact_cpu.encode(true, coarse, spread, tilt, kind, 0)
    bits = 8 * (len(stream) - 8 * 4 * lanes_of(elements)) / true.size
    counts = np.unique(true.astype(np.int64) - coarse, return_counts=True)[1] / true.size
    entropy = -(counts * np.log2(counts)).sum()
    assert entropy * 0.98 < bits < entropy * 1.03 + 0.01


def test_tables_are_a_code():
    code = exact_code()
    assert (code.frequency.sum(axis=1) == SLOTS).all()
    for row, last in enumerate(code.escape):
        assert (code.frequency[row, : last + 1] > 0).all()
        symbol = code.slot[row] & 0xFF
        np.testing.assert_array_equal(np.bincount(symbol, minlength=256), code.frequency[row])
        offset = np.arange(SLOTS) - code.start[row][symbol]
        np.testing.assert_array_equal((code.slot[row] >> 8) & 0xFFF, offset)
    for kind in KINDS:
        assert (plans(kind) & 0xFF).max() == len(code.low) - 1
        assert (plans(kind) >> 8).max() == MANTISSA[kind] - 3


def test_tables_are_those_of_the_wire_format():
    """They must not change between machines or releases without a new protocol version."""
    import hashlib

    code = exact_code()
    digest = hashlib.sha256(code.slot.tobytes() + code.low.tobytes()).hexdigest()
    assert digest[:16] == "a08a5ee28f71b288"


@settings(deadline=None)
@given(st.floats(1e-30, 1e30))
def test_error_steps(variance):
    steps = int(error_steps(np.float64(variance)))
    assert abs(steps - 4 * np.log2(variance)) <= 0.5 + 1e-6


def test_no_error_at_all():
    assert error_steps(np.zeros(2)).tolist() == [NO_ERROR] * 2


def test_lanes():
    for elements in (1, 3, 64, 11520, 65536, 2 * 80 * 36 * 3, 131072):
        lanes = lanes_of(elements)
        assert elements % lanes == 0
        assert lanes == 1 or elements // lanes >= 1024
