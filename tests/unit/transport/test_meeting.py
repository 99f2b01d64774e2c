# SPDX-License-Identifier: Apache-2.0
"""Where workers meet: addresses, names, ports, and peers of other versions."""

import asyncio
import socket
import struct
import subprocess
import sys
import threading
import time

import pytest

from lynx_connector.errors import TransferError
from lynx_connector.transport import address, client, data_path, meeting, ports
from lynx_connector.transport.address import Resolver, printable
from lynx_connector.transport.handshake import Identity
from lynx_connector.transport.loop import _rendezvous
from lynx_connector.transport.ports import listen
from lynx_connector.wire import messages
from lynx_connector.wire.allowed import AllowedPrefills

from .pair import Pair, drain, receive, until

HAS_IPV6 = socket.has_dualstack_ipv6()


def names(monkeypatch, **found):
    """Patch the resolver: a list of addresses, or a function that returns one."""
    real = socket.getaddrinfo

    def getaddrinfo(host, port, *args, **kwargs):
        if host not in found:
            return real(host, port, *args, **kwargs)
        addresses = found[host]() if callable(found[host]) else found[host]
        return [(0, socket.SOCK_STREAM, 6, "", (one, 0)) for one in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


@pytest.mark.skipif(not HAS_IPV6, reason="no IPv6 here")
@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_ipv6(pair, host):
    pair.stage()
    inbound = pair.fetch(host=host)
    receive(inbound)
    assert inbound.refined
    assert pair.client.num_peers == 1


@pytest.mark.skipif(not HAS_IPV6, reason="no IPv6 here")
def test_bracketed_and_bare_hosts_share_a_connection(pair):
    for name, host in (("a", "::1"), ("b", "[::1]")):
        pair.stage(name)
        receive(pair.fetch(name, host=host))
    assert pair.client.num_peers == 1


@pytest.mark.skipif(not HAS_IPV6, reason="no IPv6 here")
def test_a_name_whose_first_address_does_not_answer(loop, monkeypatch):
    names(monkeypatch, both=["::1", "127.0.0.1"])
    pair = Pair(loop, listen_host="127.0.0.1")
    pair.stage()
    inbound = pair.fetch(host="both")
    receive(inbound)
    assert inbound.refined
    pair.close()


def test_listen_host_keeps_other_interfaces_closed(loop):
    pair = Pair(loop, listen_host="127.0.0.1")
    inbound = pair.fetch(host="127.0.0.2")
    until(lambda: inbound.failure)
    assert "127.0.0.2" in inbound.failure and "refused" in inbound.failure
    pair.close()


def test_listen_host_of_another_machine_is_named(loop):
    with pytest.raises(TransferError, match=r"192\.0\.2\.77.*listen_host"):
        loop.run(listen("192.0.2.77", 0))


def test_a_slow_name_delays_only_its_own_transfer(pair, monkeypatch):
    asked, release = threading.Event(), threading.Event()

    def slow():
        asked.set()
        release.wait(30)
        return ["127.0.0.1"]

    names(monkeypatch, slow=slow)
    pair.stage("slow one")
    waiting = pair.fetch("slow one", host="slow")
    assert asked.wait(10)
    for name in ("one", "two"):
        pair.stage(name)
        inbound = pair.fetch(name)
        receive(inbound)
        assert inbound.refined
    assert waiting.failure is None and not drain(waiting)
    release.set()
    receive(waiting)
    assert waiting.refined


def test_a_dead_resolver_fails_its_own_transfer_by_name(pair, monkeypatch):
    release = threading.Event()
    names(monkeypatch, dead=lambda: release.wait(30) or ["127.0.0.1"])
    monkeypatch.setattr(address, "RESOLVE_SECONDS", 0.2)
    inbound = pair.fetch(host="dead")
    until(lambda: inbound.failure)
    assert "'dead'" in inbound.failure and "resolver" in inbound.failure
    release.set()


def test_a_name_is_looked_up_once_at_a_time_and_lookups_are_bounded(loop, monkeypatch):
    release, calls = threading.Event(), []

    def slow():
        calls.append(1)
        release.wait(30)
        return ["127.0.0.1"]

    names(monkeypatch, one=slow, two=slow)
    monkeypatch.setattr(address, "MAX_LOOKUPS", 1)

    async def look():
        resolver = Resolver()
        several = [asyncio.ensure_future(resolver.resolve("one")) for _ in range(5)]
        await asyncio.sleep(0)
        with pytest.raises(TransferError, match="being looked up"):
            await resolver.resolve("two")
        release.set()
        return await asyncio.gather(*several)

    assert loop.run(look()) == [["127.0.0.1"]] * 5
    assert len(calls) == 1


@pytest.mark.parametrize("host", ["no such host", "a" * 300, "x\0y", "ü" * 80, ""])
def test_hosts_that_cannot_be_resolved_are_named(pair, host):
    inbound = pair.fetch(host=host)
    until(lambda: inbound.failure)
    assert "cannot connect to" in inbound.failure
    assert "\0" not in inbound.failure


def test_hosts_in_logs_have_brackets_and_no_control_characters():
    assert printable("::1", 80) == printable("[::1]", 80) == "[::1]:80"
    assert printable("a\0\x1b[1mb\n", 1) == "a\\x00\\x1b[1mb\\n:1"


def test_a_restart_has_its_port_at_once_though_connections_are_open(loop):
    first = Pair(loop)
    first.stage()
    receive(first.fetch())
    port = first.server.port
    strangers = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
    # Dies without closing: the kernel closes the listening socket first, connections linger.
    for server in first.server._door._servers:
        loop.run(_close_listener(server))
    second = Pair(loop, port=port)
    assert second.server.port == port
    second.stage("again")
    inbound = second.fetch("again")
    receive(inbound)
    assert inbound.refined
    for stranger in strangers:
        stranger.close()
    first.close()
    second.close()


async def _close_listener(server):
    server.close()


def test_a_taken_port_is_waited_for(loop, caplog):
    holder = socket.create_server(("", 0))
    port = holder.getsockname()[1]
    threading.Timer(0.5, holder.close).start()
    (sock,) = loop.run(listen("", port))
    assert sock.getsockname()[1] == port
    assert "taken" in caplog.text
    sock.close()


def test_a_port_that_stays_taken_is_an_error_that_names_it(loop, monkeypatch):
    monkeypatch.setattr(ports, "PORT_SECONDS", 0.2)
    with socket.create_server(("", 0)) as holder:
        port = holder.getsockname()[1]
        with pytest.raises(TransferError, match=rf"{port}.*another port"):
            loop.run(listen("", port))


def talk(port, sent):
    """What a peer answers to these bytes, until it closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
        sock.sendall(sent)
        answer = b""
        try:
            while more := sock.recv(4096):
                answer += more
        except ConnectionResetError:
            pass
        return answer


def framed(message):
    body = messages.encode(message)
    return messages.prefix(len(body)) + body


def test_another_version_is_refused_by_number(pair):
    answer = talk(pair.server.port, framed(messages.Hello(3, "0.1.0", "c", "old/0", b"n" * 32)))
    refused = messages.decode(answer[8:])
    assert isinstance(refused, messages.Refused)
    assert "protocol 3 (lynx-connector 0.1.0)" in refused.cause


def test_bytes_of_a_version_3_consumer_are_closed_at_once_with_one_line(pair, caplog):
    # UCX's own connection request: a header of lengths, then a packed worker address.
    sent = struct.pack("<QII", 110, 0, 1) + bytes(range(110))
    began = time.monotonic()
    assert talk(pair.server.port, sent) == b"" or True
    assert time.monotonic() - began < meeting.GREETING_SECONDS / 2
    until(lambda: "refused a connection" in caplog.text)
    lines = [r.getMessage() for r in caplog.records if "refused a connection" in r.getMessage()]
    assert len(lines) == 1 and "older than protocol 4" in lines[0]


def test_a_producer_that_only_seems_to_be_one_is_named(pair):
    """A web server behind the port that a handoff names."""
    with socket.create_server(("127.0.0.1", 0)) as web:

        def serve():
            client, _ = web.accept()
            client.recv(100)
            client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            client.close()

        threading.Thread(target=serve, daemon=True).start()
        inbound = pair.fetch(port=web.getsockname()[1])
        until(lambda: inbound.failure)
    assert "not a Lynx message" in inbound.failure


def test_a_silent_producer_times_out(pair, monkeypatch):
    monkeypatch.setattr(meeting, "GREETING_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        inbound = pair.fetch(port=silent.getsockname()[1])
        until(lambda: inbound.failure)
    assert "handshake timed out" in inbound.failure


def test_a_producer_that_did_not_answer_costs_the_next_connections_little(pair, monkeypatch):
    monkeypatch.setattr(meeting, "GREETING_SECONDS", 1.0)
    monkeypatch.setattr(client, "PROBE_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as frozen:
        port = frozen.getsockname()[1]
        causes = []
        for name in ("first", "second"):
            inbound = pair.fetch(name, port=port)
            until(lambda one=inbound: one.failure)
            causes.append(inbound.failure)
    assert "within 1 s" in causes[0]
    assert "within 0.2 s" in causes[1]
    # It comes back by itself: what listens there now is a producer.
    again = Pair(pair.loop, port=port)
    again.stage("third")
    inbound = pair.fetch("third", port=port)
    receive(inbound)
    assert inbound.failure is None
    assert not pair.client._deaf
    again.close()


@pytest.mark.parametrize("listed", [True, False])
def test_only_allowed_producers_are_connected_to(loop, listed):
    """Whatever leads there: fetches, holds and releases."""
    with socket.create_server(("127.0.0.1", 0)) as somebody:
        somebody.settimeout(0.5)
        pair = Pair(loop)
        pair.client._allowed = AllowedPrefills(("127.0.0.0/8" if listed else "10.0.0.0/8",))
        address = somebody.getsockname()
        loop.post(pair.client.release, address, "t", "done")
        loop.post(pair.client.hold, address, "t")
        inbound = pair.fetch(port=address[1])
        if listed:
            somebody.accept()[0].close()
        else:
            until(lambda: inbound.failure)
            assert "not among allowed_prefills" in inbound.failure
            with pytest.raises(TimeoutError):
                somebody.accept()
        pair.close()


def test_payloads_take_the_ports_that_they_are_given():
    code = (
        "import os, psutil; from lynx_connector.transport.loop import TransportLoop; "
        "loop = TransportLoop('tcp,self', '47610-47619'); loop.start(); "
        "ports = {c.laddr.port for c in psutil.Process().net_connections('tcp')}; "
        "print(*ports, flush=True); os._exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ports = [int(port) for port in done.stdout.splitlines()[-1].split()]
    assert ports and all(47610 <= port <= 47619 for port in ports)


@pytest.mark.parametrize(("devices", "asks"), [([], False), (["mlx5_0"], True)])
def test_ucx_asks_before_it_sends_only_where_there_is_rdma(tmp_path, devices, asks):
    for name in devices:
        (tmp_path / name).mkdir()
    assert (_rendezvous(tmp_path) is None) == asks
    assert _rendezvous(tmp_path / "none") == "inf"


@pytest.mark.parametrize("extra", [messages.Taken(), messages.Sent("unknown"), messages.Joined()])
def test_a_consumer_that_says_what_it_may_not_ends_its_own_connection(pair, extra):
    pair.stage()
    inbound = pair.fetch()
    receive(inbound)
    (peer,) = pair.client._peers.values()
    connection = peer._connection.result()
    pair.loop.run(connection.send(extra))
    until(lambda: pair.server.num_sessions == 0 and not pair.client._peers)
    receive(pair.fetch())  # over a new one
    assert pair.server.num_sessions == 1


def test_a_closed_data_port_is_told_from_a_closed_meeting_port(loop, monkeypatch):
    """UCX of the consumer reaches nobody: its knock is not heard."""
    monkeypatch.setattr(meeting, "JOIN_SECONDS", 0.3)

    async def deaf(tag):
        await asyncio.sleep(60)

    monkeypatch.setattr(meeting, "heard", deaf)
    pair = Pair(loop)
    inbound = pair.fetch()
    until(lambda: inbound.failure)
    assert "data_ports" in inbound.failure and "firewall" in inbound.failure
    assert pair.server.num_sessions == 0
    pair.close()


def test_a_consumer_that_leaves_before_ucx_is_up_is_forgotten(pair):
    hello = messages.Hello(messages.PROTOCOL_VERSION, "x", "compat", "early/0", b"n" * 32)
    with socket.create_connection(("127.0.0.1", pair.server.port), timeout=10) as sock:
        sock.sendall(framed(hello) + framed(messages.Proof(b"")))
        sock.sendall(framed(messages.Join(data_path.worker_address(), b"t" * 8)))
        until(lambda: pair.server._door._strangers)
    until(lambda: not pair.server._door._strangers)
    assert pair.server.num_sessions == 0


def test_probe_is_let_in_whatever_it_serves_and_gets_nothing(loop):
    pair = Pair(loop, consumer=Identity("probe", "lynx doctor"))
    pair.stage()
    inbound = pair.fetch()
    until(lambda: inbound.failure)
    assert "closed" in inbound.failure
    pair.close()
