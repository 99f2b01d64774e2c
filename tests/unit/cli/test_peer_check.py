# SPDX-License-Identifier: Apache-2.0
"""`lynx doctor --peer` against a producer's real server, in another process than the doctor's."""

import asyncio

import pytest

from lynx_connector.cli.checks import Status
from lynx_connector.cli.peer_check import peer
from lynx_connector.transport import meeting
from lynx_connector.transport.handshake import Identity
from lynx_connector.wire.secrets import SharedSecrets

from ..transport.pair import Pair


@pytest.fixture
def serve(ucx_loop):
    pairs = []

    def start(*secrets, data_ports=""):
        identity = Identity("compat", "prefill-7/0", SharedSecrets(values=secrets))
        pairs.append(Pair(ucx_loop, producer=identity, data_ports=data_ports))
        return pairs[-1].server.port

    yield start
    for pair in pairs:
        pair.close()


@pytest.mark.parametrize("address", ["7600", "host:", "host:port"])
def test_a_malformed_peer_is_named(address):
    (found,) = peer(address)
    assert found.status is Status.BAD
    assert "HOST:PORT" in found.text


@pytest.mark.parametrize("address", ["127.0.0.1:9", "127.0.0.1:99999", "no.such.host.invalid:1"])
def test_a_peer_that_does_not_listen_is_bad(address):
    (found,) = peer(address)
    assert (found.name, found.status) == ("peer tcp", Status.BAD)
    assert "listen_port" in found.remedy


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_a_prefill_that_answers(serve, host):
    found = list(peer(f"{host}:{serve(data_ports='7700-7731')}"))
    assert [check.status for check in found] == [Status.GOOD] * 3
    assert "prefill-7/0" in found[1].text and "without a shared secret" in found[1].text
    assert "7700-7731" in found[2].text


def test_a_prefill_with_a_secret(serve, tmp_path):
    port = serve(b"s" * 32)
    *_, bad = peer(f"127.0.0.1:{port}")
    assert (bad.name, bad.status) == ("peer lynx", Status.BAD)
    assert "--secret-file" in bad.remedy
    path = tmp_path / "secret"
    path.write_bytes(b"s" * 32)
    found = list(peer(f"127.0.0.1:{port}", path))
    assert [check.status for check in found] == [Status.GOOD] * 3
    assert "with a shared secret" in found[1].text


def test_closed_data_ports_are_told_from_a_closed_listen_port(serve, monkeypatch):
    async def deaf(tag):
        await asyncio.sleep(60)

    monkeypatch.setattr(meeting, "JOIN_SECONDS", 0.5)
    monkeypatch.setattr(meeting, "heard", deaf)
    *_, bad = peer(f"127.0.0.1:{serve(data_ports='7700-7731')}")
    assert bad.status is Status.BAD
    assert "7700-7731" in bad.text and "the ports that carry the KV are not" in bad.remedy
