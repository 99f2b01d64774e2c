# SPDX-License-Identifier: Apache-2.0
"""Leases of what waits on the decode side, and peers that hang."""

import asyncio
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lynx_connector.codec import Tier
from lynx_connector.transport import client as client_module
from lynx_connector.transport.client import TierClient
from lynx_connector.transport.connection import Connection
from lynx_connector.transport.holds import Holds
from lynx_connector.wire import messages

from .pair import TOKENS, NoTablesNeeded, Pair, receive, until


@pytest.fixture
def held(ucx_loop):
    """A pair whose leases end before anybody holds them twice."""
    pair = Pair(ucx_loop, lease=2.5)
    yield pair
    pair.close()


def hold(pair, name):
    pair.loop.post(pair.client.hold, ("127.0.0.1", pair.server.port), name)


def test_a_lease_is_kept_from_when_the_decode_side_knows_the_request(held):
    held.stage("kept")
    held.stage("forgotten")
    hold(held, "kept")
    until(lambda: len(held.store) == 1)
    time.sleep(3.5)  # longer than the lease
    assert len(held.store) == 1
    inbound = held.fetch("kept")
    receive(inbound)
    assert inbound.refined


def test_a_released_transfer_is_held_no_more(held):
    held.stage("t")
    hold(held, "t")
    address = ("127.0.0.1", held.server.port)
    held.loop.post(held.client.release, address, "t", "request ended before its load")
    until(lambda: len(held.store) == 0)
    peer = held.client._peers[address]
    assert len(peer.holds) == 0


def test_holding_what_is_not_there_harms_nobody(held):
    held.stage("t")
    hold(held, "unknown")
    inbound = held.fetch("t")
    receive(inbound)
    assert inbound.refined


def test_holding_at_a_producer_that_is_gone_is_passed_over(ucx_loop):
    client = TierClient(Pair(ucx_loop).client._identity, 1.0, NoTablesNeeded())
    ucx_loop.post(client.hold, ("127.0.0.1", 1), "t")
    until(lambda: client.num_peers == 0)


@given(st.sets(st.text("0123456789abcdef", min_size=128, max_size=128), max_size=20))
def test_any_number_of_transfers_fits_into_slots(names):
    sent = []

    async def send(message):
        messages.encode(message)
        sent.extend(message.transfer_ids)
        if len(sent) == len(names):
            raise ConnectionError

    async def run():
        holds = Holds(send)
        for name in names:
            holds.add(name)
        try:
            async with asyncio.timeout(0.01 if not names else 10):
                await holds.run()
        except (ConnectionError, TimeoutError):
            pass

    asyncio.run(run())
    assert set(sent) == names


def end_of(frame):
    return frame.first_token + frame.num_tokens


@pytest.mark.parametrize(("tier", "last"), [(Tier.ANCHOR, TOKENS), (Tier.RESIDUAL, TOKENS - 16)])
def test_a_last_frame_that_is_lost_is_missed_while_others_come(ucx_loop, monkeypatch, tier, last):
    """Not by silence: the connection is heard of all the time."""
    whole = Connection.send

    async def lossy(self, message, payload=None):
        frame = message if isinstance(message, messages.Frame) else None
        if frame is None or (frame.transfer_id, frame.tier, end_of(frame)) != (
            "unlucky",
            tier,
            last,
        ):
            await whole(self, message, payload)

    monkeypatch.setattr(Connection, "send", lossy)
    pair = Pair(ucx_loop)
    pair.client._timeout = 3600.0
    pair.stage("unlucky")
    unlucky = pair.fetch("unlucky")
    for number in range(4):
        pair.stage(f"other-{number}")
        other = pair.fetch(f"other-{number}")
        receive(other)
        assert other.refined
    until(lambda: unlucky.failure)
    assert unlucky.failure.endswith("frames are missing")
    until(lambda: len(pair.store) == 4)  # it was released; nobody has released the others
    pair.close()


class Frozen:
    """A producer's server whose sender and answers can be stopped and let go on."""

    def __init__(self, loop):
        self.pair = Pair(loop)
        self.pair.client._timeout = 1.0

    def freeze(self, monkeypatch):
        async def never(self, fetch):
            """As under SIGSTOP: what was asked for is not looked at."""

        from lynx_connector.transport.server import _Session

        monkeypatch.setattr(_Session, "_fetch", never)


def test_a_peer_that_was_silent_costs_the_next_transfers_little(ucx_loop, monkeypatch):
    monkeypatch.setattr(client_module, "PROBE_SECONDS", 0.2)
    frozen = Frozen(ucx_loop)
    pair = frozen.pair
    with monkeypatch.context() as patch:
        frozen.freeze(patch)
        pair.stage("first")
        first = pair.fetch("first")
        until(lambda: first.failure)
        assert first.failure.endswith("silent for 1 s")
        peer = pair.client._peers["127.0.0.1", pair.server.port]
        pair.stage("second")
        second = pair.fetch("second")
        until(lambda: second.failure)
        assert "silent for 0.2 s, as for 1 s before" in second.failure
        assert peer._silent
    pair.stage("third")
    third = pair.fetch("third")
    receive(third)
    assert third.refined and not peer._silent
    pair.close()
