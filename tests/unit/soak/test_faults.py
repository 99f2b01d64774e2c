# SPDX-License-Identifier: Apache-2.0
"""Faults on real processes that answer /health and nothing else."""

import asyncio
import os
import random
import sys
import time

import pytest

from lynx_connector.testbed.cluster import free_port
from lynx_connector.testbed.process import ServerError, ServerProcess
from tests.soak import faults, servers
from tests.soak.faults import DIED, FAULTS, KILL, STOP, ServerFaults

SERVE = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(faults, "STOP_SECONDS", (0.1, 0.2))
    monkeypatch.setattr(faults, "DEAD_SECONDS", 0.0)
    port = free_port()
    command = [sys.executable, "-c", SERVE, str(port)]
    log = tmp_path / "one.log"
    one = ServerProcess("one", command, f"http://127.0.0.1:{port}", log, dict(os.environ))
    yield one
    one.stop()


def in_loop(server, work):
    """Start the server where its starter's thread lives on, then do `work`."""

    async def all_of_it():
        server.start()
        await servers.ready([server], 60)
        return await work()

    return asyncio.run(all_of_it())


@pytest.mark.parametrize("kind", FAULTS)
def test_a_server_is_back_after_each_fault(server, kind):
    trouble = ServerFaults([server], [], 0.05, random.Random(1))
    pids = []

    async def work():
        pids.append(server.pid)
        running = asyncio.ensure_future(trouble.run([kind], time.time() + 3600))
        while not (trouble.windows and trouble.windows[0].end):
            await asyncio.sleep(0.02)
            assert not running.done(), running.result()
        running.cancel()
        await asyncio.wait([running])

    in_loop(server, work)
    first = trouble.windows[0]
    assert (first.what, first.server) == (kind, "one")
    assert first.start < first.end <= trouble.last_end
    assert trouble.failed_starts == trouble.died == []
    if kind != STOP:
        assert server.pid != pids[0]


def test_a_server_that_dies_by_itself_is_told_and_started_again(server):
    trouble = ServerFaults([], [server], 3600, random.Random(1))

    async def work():
        care = asyncio.ensure_future(trouble.look_after())
        server.kill()
        while not (trouble.windows and trouble.windows[0].end):
            await asyncio.sleep(0.02)
            assert not care.done(), care.result()
        care.cancel()
        assert server.running

    in_loop(server, work)
    assert [window.what for window in trouble.windows] == [DIED]
    assert trouble.died[0].startswith("one at ")


def test_a_server_that_does_not_come_back_ends_the_run(server, monkeypatch):
    trouble = ServerFaults([server], [], 0.05, random.Random(1))

    async def work():
        server.command = [sys.executable, "-c", "raise SystemExit('Device is busy')"]
        await trouble.run([KILL], time.time() + 3600)

    with pytest.raises(ServerError, match="did not come back"):
        in_loop(server, work)
    assert len(trouble.failed_starts) == faults.RESTARTS
    assert "Device is busy" in trouble.failed_starts[0]


def test_nothing_happens_without_kinds(server):
    trouble = ServerFaults([server], [], 0.0, random.Random(1))
    asyncio.run(trouble.run([], time.time() + 3600))
    assert trouble.windows == [] and trouble.last_end == 0.0
