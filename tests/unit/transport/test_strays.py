# SPDX-License-Identifier: Apache-2.0
"""Strangers on every port that a producer opens: port scans, other protocols, peers that stall.

Whatever they send, the process is back at idle soon, and transfers under way do not notice.
`LYNX_STRAYS` sets how many connections of each kind are made.
"""

import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from lynx_connector.transport.handshake import Identity
from lynx_connector.wire import messages
from lynx_connector.wire.secrets import SharedSecrets

from .pair import Pair, receive

STRAYS = int(os.environ.get("LYNX_STRAYS", "250"))
BACK_SECONDS = 10.0
HELD = 64
"""Connections that strangers keep open at a time."""


def framed(message):
    body = messages.encode(message)
    return messages.prefix(len(body)) + body


HELLO = framed(messages.Hello(messages.PROTOCOL_VERSION, "x", "compat", "stray/0", b"n" * 32))
KINDS = {
    "scan": b"",
    "noise": bytes(8) + os.urandom(4096),
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "half-http": b"GET /query HTTP/1.1\r\nHost:",
    "tls": bytes.fromhex("16030100f5010000f10303") + os.urandom(234),
    "huge": messages.PREFIX.pack(b"LYNX", 1 << 31) + b"x" * 100,
    "other-version": framed(messages.Hello(3, "0.1.0", "c", "old/0", b"n" * 32)),
    "greets-and-stalls": HELLO,
    "wrong-proof": HELLO + framed(messages.Proof(b"p" * 32)),
    "joins-with-noise": HELLO + framed(messages.Proof(b"p" * 32)) + os.urandom(2000),
    "ucx-like": struct.pack("<QQ", 0x1ABE11ED, 110) + os.urandom(110),
}


def stray(port, sent, held):
    """One connection; a held one stays until it is closed by `close_held`, others end at once,
    every other one with a reset."""
    with contextlib.suppress(OSError):
        sock = socket.create_connection(("127.0.0.1", port), timeout=5)
        if len(held) % 2:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with contextlib.suppress(OSError):
            sock.sendall(sent)
        held.append(sock)
        if len(held) > HELD:
            held.pop(0).close()


@pytest.fixture(scope="module", params=[False, True], ids=["open", "secret"])
def serving(request, tmp_path_factory):
    arguments = []
    if request.param:
        secret = tmp_path_factory.mktemp("strays") / "secret"
        secret.write_bytes(b"s" * 32)
        arguments = [str(secret)]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.unit.transport.serving", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    ports = json.loads(process.stdout.readline())
    watched = psutil.Process(process.pid)
    listening = {c.laddr.port for c in watched.net_connections("tcp") if c.status == "LISTEN"}
    # UCX has one for each network interface, all alike.
    ports["data"] = min(listening - set(ports.values()))
    yield watched, ports, SharedSecrets(values=(b"s" * 32,) if request.param else ())
    process.stdin.close()
    process.wait(20)


def idle(process, fds):
    """Whether it holds no more descriptors than then, and sleeps."""
    if process.num_fds() > fds:
        return False
    before = process.cpu_times()
    time.sleep(1.0)
    after = process.cpu_times()
    return after.user + after.system - before.user - before.system < 0.15


@pytest.mark.parametrize("where", ["meeting", "data", "bootstrap"])
@pytest.mark.parametrize("kind", KINDS)
def test_strangers_cost_nothing_that_lasts(serving, client, where, kind):
    process, ports, _ = serving
    client(process)
    fds = process.num_fds()
    held = []
    with ThreadPoolExecutor(4) as pool:
        for _ in range(STRAYS):
            pool.submit(stray, ports[where], KINDS[kind], held)
        done = [client(process) for _ in range(3)]  # while they knock
    assert all(done)
    for sock in held:
        sock.close()
    deadline = time.monotonic() + BACK_SECONDS
    while not idle(process, fds):
        assert time.monotonic() < deadline, (
            f"{process.num_fds()} descriptors ({fds} before), {process.cpu_percent(1.0)} % CPU"
        )


@pytest.fixture
def client(serving, ucx_loop):
    """Fetches one transfer after the other from the watched process."""
    _, ports, secrets = serving
    pair = CLIENTS.get(id(secrets))
    if pair is None:
        identity = Identity("compat", "engine/0", secrets)
        pair = CLIENTS[id(secrets)] = Pair(ucx_loop, consumer=identity)

    def fetch(process):
        name = f"t{next(NAMES) % 400:03}"
        inbound = pair.fetch(name, port=ports["meeting"])
        receive(inbound)
        assert inbound.failure is None
        return inbound.refined

    return fetch


CLIENTS = {}
NAMES = iter(range(10**9))
