# SPDX-License-Identifier: Apache-2.0
"""A staged transfer goes through the states of its table, and its memory is counted with them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lynx_connector.errors import TransferError
from lynx_connector.lifecycle.transfer import WHOLE, TransferState
from lynx_connector.tiers.pieces import TierBuffers
from lynx_connector.tiers.staging import StagedTransfer, StagingStore
from tests.unit.objects import NO_EVENTS

TOKENS = 4
STEPS = ("fetch", "advance", "release", "refuse", "expire", "fail")


class Sized(TierBuffers):
    """Buffers of a known size."""

    num_bytes = 100


def store_with(lease: float = 60.0) -> tuple[StagingStore, StagedTransfer]:
    store = StagingStore(1 << 20, lease, NO_EVENTS)
    transfer = StagedTransfer("t", "request", TOKENS, Sized([]))
    assert store.open(transfer)
    return store, transfer


def take(store: StagingStore, transfer: StagedTransfer, step: str) -> None:
    if step == "advance":
        encoded = min(transfer.encoded + 1, TOKENS)
        if encoded > transfer.encoded:
            store.advance(transfer, encoded)
    elif step == "expire":
        store.expire()
    elif step == "fetch":
        try:
            store.fetch("t", 0, TOKENS)
        except TransferError:
            assert transfer.dropped
    else:
        store.release("t", step)


@given(st.lists(st.sampled_from(STEPS)))
def test_whatever_happens_state_and_memory_agree(steps):
    store, transfer = store_with(lease=-1.0)
    asked = False
    for step in steps:
        asked |= step == "fetch" and not transfer.dropped
        take(store, transfer, step)
        state = transfer.life.state
        assert transfer.dropped == (store.used_bytes == 0)
        assert len(store) == (not transfer.dropped)
        if transfer.dropped:
            assert state in (TransferState.RELEASED, TransferState.EXPIRED)
        elif transfer.encoded == TOKENS:
            assert state is (TransferState.SERVED if asked else TransferState.STAGED)
        else:
            assert state is (TransferState.EARLY if asked else TransferState.EXPECTED)


def test_the_lease_runs_from_the_last_row_on():
    store, transfer = store_with(lease=-1.0)
    store.advance(transfer, TOKENS - 1)
    assert store.expire() == [] and transfer.life.state not in WHOLE
    store.advance(transfer, TOKENS)
    assert store.expire() == [transfer]
    assert transfer.life.state is TransferState.EXPIRED
    with pytest.raises(TransferError, match="lease_seconds"):
        store.fetch("t", 0, TOKENS)


def test_rows_of_an_ended_transfer_change_nothing():
    store, transfer = store_with()
    store.drop("t", "client left")
    assert store.advance(transfer, TOKENS) is False
    assert (transfer.encoded, store.used_bytes) == (0, 0)


def test_another_transfer_than_the_one_meant_is_not_served():
    store, transfer = store_with()
    with pytest.raises(TransferError, match="asked for tokens 0 to 5"):
        store.fetch("t", 0, TOKENS + 1)
    assert transfer.life.state is TransferState.EXPECTED
