# SPDX-License-Identifier: Apache-2.0
"""Shared secrets and encryption between a real server and a real client."""

import asyncio

import numpy as np
import pytest

from lynx_connector.transport import stream as stream_module
from lynx_connector.transport.data_path import DataPath
from lynx_connector.transport.handshake import Identity
from lynx_connector.transport.stream import MessageStream
from lynx_connector.wire.secrets import SharedSecrets

from .pair import Pair, drain, receive, until

A, B, C = (letter * 32 for letter in (b"a", b"b", b"c"))


def knows(*secrets, encrypt=False):
    return Identity("compat", "e/0", SharedSecrets(values=secrets), encrypt)


def ended(pair):
    inbound = pair.fetch()
    until(lambda: inbound.refined or inbound.failure or (not drain(inbound) and inbound.refined))
    return inbound


@pytest.fixture
def sealed(loop):
    pair = Pair(loop, consumer=knows(A, encrypt=True), producer=knows(A))
    yield pair
    pair.close()


@pytest.mark.parametrize(
    ("producer", "consumer", "cause"),
    [
        ((A,), (A,), None),
        ((A,), (B,), "another shared secret"),
        ((A,), (), "this side none: set secret_file"),
        ((), (A,), "no shared secret"),
        # The steps of a rotation from A to B, each on one side before the other.
        ((A, B), (A,), None),
        ((A,), (A, B), None),
        ((B, A), (A, B), None),
        ((A, B), (B, A), None),
        ((B,), (B, A), None),
        ((B, A), (B,), None),
        ((C, A), (A,), "another shared secret"),
    ],
)
@pytest.mark.parametrize("encrypt", [False, True])
def test_secrets(loop, producer, consumer, cause, encrypt):
    pair = Pair(
        loop,
        consumer=knows(*consumer, encrypt=encrypt and bool(consumer)),
        producer=knows(*producer),
    )
    transfer = pair.stage()
    inbound = ended(pair)
    if cause is None:
        assert inbound.failure is None and inbound.refined
        for got, sent in zip(inbound.buffers.pieces, transfer.buffers.pieces, strict=True):
            for tier, rows in sent.rows.items():
                np.testing.assert_array_equal(got.rows[tier], rows)
    else:
        assert cause in inbound.failure
        assert pair.server.num_sessions == 0
    pair.close()


@pytest.fixture
def overheard(monkeypatch):
    """All that crosses the network, as (kind, bytes)."""
    heard = []
    write, send = asyncio.StreamWriter.write, DataPath.send

    def overheard_write(self, data):
        heard.append(("message", bytes(data)))
        write(self, data)

    async def overheard_send(self, payload):
        heard.append(("payload", payload.tobytes()))
        await send(self, payload)

    monkeypatch.setattr(stream_module.asyncio.StreamWriter, "write", overheard_write)
    monkeypatch.setattr(DataPath, "send", overheard_send)
    return heard


@pytest.mark.parametrize(
    ("secrets", "encrypt"), [((), None), ((A,), None), ((A,), "consumer"), ((A,), "producer")]
)
def test_what_a_listener_can_read(loop, overheard, secrets, encrypt):
    pair = Pair(
        loop,
        consumer=knows(*secrets, encrypt=encrypt == "consumer"),
        producer=knows(*secrets, encrypt=encrypt == "producer"),
    )
    transfer = pair.stage("very-telling-name")
    inbound = pair.fetch("very-telling-name")
    receive(inbound)
    assert inbound.failure is None
    messages = b"".join(data for kind, data in overheard if kind == "message")
    payloads = b"".join(data for kind, data in overheard if kind == "payload")
    rows = next(iter(transfer.buffers.pieces[-1].rows.values())).tobytes()[:64]
    assert (b"very-telling-name" in messages) == (not secrets)
    assert (rows in payloads) == (encrypt is None)
    assert not any(secret in messages + payloads for secret in secrets)
    pair.close()


def altered(monkeypatch, change, at=3):
    """A peer in the middle: payload number `at` goes through `change`."""
    send, sent = DataPath.send, []

    async def send_altered(self, payload):
        if payload.nbytes > 16:  # no knock
            sent.append(payload.copy())
            if len(sent) == at:
                payload = change(sent)
        await send(self, payload)

    monkeypatch.setattr(DataPath, "send", send_altered)


def flipped(sent):
    forged = sent[-1].copy()
    forged[forged.nbytes // 2] ^= 1
    return forged


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(flipped, id="flipped"),
        pytest.param(lambda sent: np.resize(sent[0], sent[-1].nbytes), id="replayed"),
        pytest.param(lambda sent: sent[-1][:-1], id="cut"),
        pytest.param(lambda sent: np.zeros_like(sent[-1]), id="invented"),
    ],
)
def test_a_forged_frame_fails_its_transfer_and_no_other(sealed, monkeypatch, change):
    altered(monkeypatch, change)
    sealed.stage()
    inbound = sealed.fetch()
    until(lambda: inbound.failure)
    assert "changed, cut or replayed on its way" in inbound.failure
    until(lambda: sealed.store.used_bytes == 0)
    sealed.stage("next")
    inbound = sealed.fetch("next")
    receive(inbound)
    assert inbound.failure is None
    assert sealed.server.num_sessions == 1, "the connection goes on"


@pytest.mark.parametrize("side", ["consumer", "producer"])
def test_a_forged_message_ends_the_connection(sealed, monkeypatch, side):
    """What was sealed by somebody else, or for another place in the order, cannot be read."""
    sealed.stage("first")
    receive(sealed.fetch("first"))
    write = MessageStream.write
    state = {"forge": True}

    def forged(self, message):
        is_consumer = self.peer.startswith("127.0.0.1:")
        if state["forge"] and is_consumer == (side == "consumer"):
            state["forge"] = False
            self.seals.out.seal_message(b"skipped")  # as if one message had been swallowed
        write(self, message)

    monkeypatch.setattr(MessageStream, "write", forged)
    sealed.stage()
    inbound = sealed.fetch()
    until(lambda: inbound.failure)
    assert not state["forge"]
    if side == "producer":
        assert "control message was changed" in inbound.failure
    receive(sealed.fetch())  # over a new connection
    assert sealed.server.num_sessions == 1


def test_each_connection_has_keys_of_its_own(loop, overheard):
    """The same transfer twice: nothing that was sealed occurs again."""
    pair = Pair(loop, consumer=knows(A, encrypt=True), producer=knows(A))
    for name in ("1", "2"):
        pair.stage(name)  # the same rows
        receive(pair.fetch(name))
        peer = next(iter(pair.client._peers.values()))
        loop.post(peer._connection.result()._stream.abort)
        until(lambda: not pair.client._peers)
    payloads = [data for kind, data in overheard if kind == "payload" and len(data) > 16]
    assert len(payloads) == len(set(payloads)) > 4
    pair.close()
