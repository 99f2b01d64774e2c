# SPDX-License-Identifier: Apache-2.0
"""Frames that a broken or hostile producer may send: refused before anything is written."""

import numpy as np
import pytest

from lynx_connector.codec import KVGeometry, Tier, get_codec
from lynx_connector.consumer.budget import Reservation, StagingBudget
from lynx_connector.consumer.inbound import InboundTransfer
from lynx_connector.engine.metadata import LoadRequest
from lynx_connector.errors import TransferError
from lynx_connector.tiers.pieces import TierBuffers, plan_pieces
from lynx_connector.tiers.raw_vectors import record_bytes
from lynx_connector.wire import messages

GEOMETRY = KVGeometry(2, 2, 64, "float32")
CODEC, RAW = get_codec("hadamard", GEOMETRY), get_codec("bf16", GEOMETRY)
TOKENS = 60
RECORD = record_bytes(64 * 4)


@pytest.fixture
def budget():
    return StagingBudget(1 << 20)


@pytest.fixture
def inbound(budget):
    """Tokens 0 to 59, the first exact, all others with three tiers."""
    buffers = TierBuffers(plan_pieces(TOKENS, 0, 1, 0, CODEC, RAW, exact_tier=True))
    buffers.allocate()
    load = LoadRequest("r", "t", "h", [], "hadamard", 1, 0, TOKENS, 0, [], True)
    reservation = Reservation.take(budget, buffers.num_bytes, buffers.spare_bytes)
    inbound = InboundTransfer(load, buffers, np.arange(TOKENS), GEOMETRY, reservation)
    land(inbound, frame(Tier.ANCHOR, 0, 1, codec="bf16"))
    return inbound


def frame(tier, first, count, num_bytes=None, codec="hadamard", exceptions=0):
    if num_bytes is None:
        width = {"hadamard": CODEC, "bf16": RAW}[codec].bytes_per_token(tier)
        num_bytes = count * width + exceptions * RECORD
    return messages.Frame("t", int(tier), codec, first, count, num_bytes, 0, exceptions)


def land(inbound, one, payload=None):
    buffer = inbound.buffer(one)
    buffer[:] = 0 if payload is None else payload
    return inbound.landed(one, buffer)


def rows(inbound, count=59):
    land(inbound, frame(Tier.ANCHOR, 1, count))
    land(inbound, frame(Tier.RESIDUAL, 1, count))


def exact(lengths, size=None):
    lengths = np.array(lengths, "<u4")
    data = int(lengths.sum(dtype=np.int64)) if size is None else size
    return np.concatenate([lengths.view(np.uint8), np.zeros(data, np.uint8)])


def test_no_tier_before_the_one_it_refines(inbound):
    with pytest.raises(TransferError, match="came before their anchor"):
        inbound.buffer(frame(Tier.RESIDUAL, 1, 10))
    land(inbound, frame(Tier.ANCHOR, 1, 10))
    with pytest.raises(TransferError, match="came before their anchor"):
        inbound.buffer(frame(Tier.RESIDUAL, 1, 11))
    land(inbound, frame(Tier.RESIDUAL, 1, 10))
    with pytest.raises(TransferError, match="came before their residual"):
        inbound.buffer(frame(Tier.EXACT, 1, 11, 100))
    assert inbound.buffer(frame(Tier.EXACT, 1, 10, 100)).nbytes == 100


@pytest.mark.parametrize(
    "one",
    [
        frame(Tier.ANCHOR, 1, 5, exceptions=1, num_bytes=5 * CODEC.bytes_per_token(0)),
        frame(Tier.ANCHOR, 1, 5, exceptions=0, num_bytes=5 * CODEC.bytes_per_token(0) + RECORD),
        frame(Tier.ANCHOR, 1, 5, exceptions=5 * 8 + 1),
        frame(Tier.RESIDUAL, 1, 5, exceptions=1),
        frame(Tier.EXACT, 1, 5, num_bytes=19),
        frame(Tier.EXACT, 1, 5, num_bytes=1 << 29),
        frame(Tier.EXACT, 1, 5, num_bytes=100, exceptions=1),
    ],
)
def test_sizes_that_cannot_be(inbound, one):
    with pytest.raises(TransferError, match="malformed"):
        inbound.buffer(one)


def test_exceptions_outside_the_frame(inbound):
    one = frame(Tier.ANCHOR, 1, 5, exceptions=1)
    with pytest.raises(TransferError, match="malformed exceptions"):
        land(inbound, one, 255)


@pytest.mark.parametrize(
    "payload", [exact([3, 3, 3], 8), exact([3, 3, 3], 10), exact([2**32 - 1] * 3, 9)]
)
def test_exact_lengths_that_do_not_add_up(inbound, payload):
    rows(inbound)
    with pytest.raises(TransferError, match="lengths add up"):
        land(inbound, frame(Tier.EXACT, 1, 3, payload.nbytes), payload)


def test_staging_counts_what_the_producer_decides(inbound, budget):
    """Exact frames live on the estimate first; once written they make room for the next."""
    rows(inbound)
    used = budget.used
    payload = exact([100] * 59)
    land(inbound, frame(Tier.EXACT, 1, 59, payload.nbytes), payload)
    assert budget.used == used
    while landed := inbound.take_landed():
        inbound.mark_written(landed)
    assert inbound.refined
    inbound.reservation.close()
    inbound.reservation.close()
    assert budget.used == 0


def test_no_room_for_exceptions(inbound, budget):
    budget.limit = budget.used
    spare = inbound.buffers.spare_bytes
    inbound.reservation.use(spare)
    with pytest.raises(TransferError, match="staging is full"):
        inbound.buffer(frame(Tier.ANCHOR, 1, 5, exceptions=1))


def test_frame_of_a_transfer_that_ended(inbound):
    inbound.reservation.close()
    with pytest.raises(TransferError, match="ended"):
        inbound.buffer(frame(Tier.ANCHOR, 1, 5, exceptions=1))
