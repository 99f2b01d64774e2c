# SPDX-License-Identifier: Apache-2.0
"""A server and a client over real UCX on loopback, both in one transport loop, on real tiers."""

import time

import numpy as np

from lynx_connector.codec import KVGeometry, get_codec
from lynx_connector.consumer.budget import Reservation, StagingBudget
from lynx_connector.consumer.inbound import InboundTransfer
from lynx_connector.engine.metadata import LoadRequest
from lynx_connector.telemetry.events import EventLog
from lynx_connector.tiers.pieces import TierBuffers, plan_pieces
from lynx_connector.tiers.staging import StagedTransfer, StagingStore
from lynx_connector.transport.client import TierClient
from lynx_connector.transport.handshake import Identity
from lynx_connector.transport.server import TierServer

GEOMETRY = KVGeometry(2, 2, 64, "float32")
TOKENS = 100
NO_EVENTS = EventLog(None, "test")


class NoTablesNeeded:
    max_bytes = 0

    def known(self, digest):
        return True


def inbound_of(load, buffers, slots):
    budget = StagingBudget(1 << 30)
    return InboundTransfer(load, buffers, slots, GEOMETRY, Reservation.take(budget, 0))


class Pair:
    """A producer's store and server, a consumer's client, and one transfer between them."""

    def __init__(
        self,
        loop,
        consumer=None,
        lease=60.0,
        limit=1 << 30,
        link_mbit=0.0,
        producer=None,
        listen_host="",
        port=0,
        data_ports="",
    ):
        self.loop = loop
        identity = Identity("compat", "engine/0")
        self.store = StagingStore(limit, lease, NO_EVENTS)
        self.server = TierServer(
            self.store, producer or identity, NO_EVENTS, 4096, link_mbit, data_ports=data_ports
        )
        loop.run(self.server.start(port, listen_host))
        self.client = TierClient(consumer or identity, 3.0, NoTablesNeeded())
        self.codec, self.exact = get_codec("hadamard", GEOMETRY), get_codec("bf16", GEOMETRY)

    def pieces(self, first=0):
        return plan_pieces(TOKENS, first, 1, 16, self.codec, self.exact)

    def stage(self, name="t", encoded=TOKENS):
        transfer = StagedTransfer(name, "request", TOKENS, TierBuffers(self.pieces()))
        if self.store.open(transfer):
            rng = np.random.default_rng(len(name))
            for piece in transfer.buffers.pieces:
                for rows in piece.rows.values():
                    rows[:] = rng.integers(0, 255, rows.shape, np.uint8)
            self.store.advance(transfer, encoded)
        return transfer

    def fetch(self, name="t", first=0, port=None, host="127.0.0.1"):
        buffers = TierBuffers(self.pieces(first))
        buffers.allocate()
        load = LoadRequest("r", name, "127.0.0.1", [], "hadamard", 1, 16, TOKENS, first, [], True)
        inbound = inbound_of(load, buffers, np.arange(TOKENS - first))
        address = (host, port or self.server.port)
        self.loop.post(self.client.fetch, address, inbound, first, TOKENS)
        return inbound

    def close(self):
        self.loop.run(self.server.stop())


def until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.01)


def drain(inbound):
    rows = []
    while landed := inbound.take_landed():
        inbound.mark_written(landed)
        rows.append(landed)
    return rows


def receive(inbound):
    rows = []

    def done():
        rows.extend(drain(inbound))
        return inbound.refined or inbound.failure

    until(done)
    return rows
