# SPDX-License-Identifier: Apache-2.0
"""Slots are computed for a request's own blocks only."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lynx_connector.errors import TransferError
from lynx_connector.tiers.pieces import TokenRange, slots_of


@given(st.integers(0, 100), st.integers(0, 100), st.integers(1, 32), st.integers(0, 3))
def test_every_token_has_its_slot(start, length, block_size, before):
    """`before`: blocks at the front that hold none of the tokens."""
    first = max(start // block_size - before, 0)
    end = start + length
    blocks = [7 + 3 * i for i in range(first, -(-end // block_size))]
    slots = slots_of(TokenRange(start, end), blocks, first, block_size, null_block=0)
    expected = [(7 + 3 * (t // block_size)) * block_size + t % block_size
                for t in range(start, end)]  # fmt: skip
    assert slots.tolist() == expected and slots.dtype == np.int64


@pytest.mark.parametrize(
    ("tokens", "blocks", "first_block"),
    [
        ((0, 64), [0, 2, 3, 4], 0),  # the null block: behind a sliding window
        ((0, 64), [5, 2, 0, 4], 0),
        ((0, 64), [5, 2, 3], 0),  # too few
        ((0, 64), [], 0),
        ((0, 64), [5, 2, 5, 4], 0),  # twice
        ((0, 64), [5, -1, 6, 4], 0),
        ((0, 64), [5, 6, 7, 8], 1),  # begins behind the first token: would wrap around
        ((1 << 40, (1 << 40) + 8), [5], 0),
    ],
)
def test_without_a_block_of_its_own_nothing_is_written(tokens, blocks, first_block):
    with pytest.raises(TransferError, match="no KV blocks of their own"):
        slots_of(TokenRange(*tokens), blocks, first_block, 16, null_block=0)


def test_blocks_that_hold_none_of_the_tokens_do_not_matter():
    slots = slots_of(TokenRange(16, 32), [0, 9, 0], 0, 16, null_block=0)
    assert slots.tolist() == list(range(144, 160))
    assert not len(slots_of(TokenRange(3, 3), [], 0, 16, null_block=0))
