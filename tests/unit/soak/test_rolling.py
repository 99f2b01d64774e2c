# SPDX-License-Identifier: Apache-2.0
"""A rolling restart of real processes that answer /health: the router is told before the server."""

import asyncio
import os
import random
import sys
from types import SimpleNamespace

import httpx
import pytest

from lynx_connector.testbed.cluster import free_port
from lynx_connector.testbed.process import ServerError, ServerProcess
from tests.soak import faults, load, rolling, servers
from tests.soak.client import Choice
from tests.soak.faults import ROLL, ServerFaults
from tests.soak.kinds import COMPLETIONS, Case, Route
from tests.soak.load import Load
from tests.soak.reference import Turn

SERVE = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def do_POST(self):
        print("told", self.path, flush=True)
        self.send_response(int(sys.argv[2]))
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


class Fleet:
    """One server, and routers that answer with `status` when they are told something."""

    def __init__(self, folder, status=200):
        self.folder, self.status = folder, status
        self.router = SimpleNamespace(url="http://usual")
        self.routers = []
        self.engine = self.make_router("decode-0")
        self.decodes = [self.engine]
        self.routers.clear()

    def make_router(self, name):
        port = free_port()
        command = [sys.executable, "-c", SERVE, str(port), str(self.status)]
        log = self.folder / f"{name}.log"
        made = ServerProcess(name, command, f"http://127.0.0.1:{port}", log, dict(os.environ))
        self.routers.append(made)
        return made


def rolled(fleet, monkeypatch):
    """Roll the fleet's server under load; its faults, and the addresses that were asked."""
    monkeypatch.setattr(faults, "DEAD_SECONDS", 0.5)
    monkeypatch.setattr(load, "ROLLING_PAUSE_SECONDS", 0.01)
    asked = []

    def respond(request):
        asked.append((request.url.host, request.url.port, fleet.engine.running))
        answer = {"index": 0, "text": "a", "token_ids": [5], "finish_reason": "length"}
        return httpx.Response(200, json={"choices": [answer]})

    def client(connections):
        return httpx.AsyncClient(transport=httpx.MockTransport(respond))

    monkeypatch.setattr(load, "new_client", client)
    cases = [
        Case("greedy", "routed", COMPLETIONS, {"max_tokens": 1}),
        Case("plain", "past the router", COMPLETIONS, {"max_tokens": 1}, route=Route.PLAIN),
    ]
    turns = {case.name: [Turn(case.body, [Choice("a", [5], "length")])] for case in cases}
    clients = Load(fleet, cases, turns, clients=2, seed=1, leave=0.0)
    trouble = ServerFaults([fleet.engine], [], 3600, random.Random(1))

    async def work():
        fleet.engine.start()
        await servers.ready([fleet.engine], 60)
        before = fleet.engine.pid
        try:
            await clients.run_beside(
                rolling.roll(fleet, fleet.decodes, clients, trouble, lambda line: None)
            )
            assert fleet.engine.pid != before and fleet.engine.running
        finally:
            fleet.engine.stop()

    try:
        asyncio.run(work())
    finally:
        assert clients.router is fleet.router
        assert not any(router.running for router in fleet.routers)
    return trouble, clients, asked


def test_the_router_forgets_a_server_before_it_is_restarted(tmp_path, monkeypatch):
    fleet = Fleet(tmp_path)
    trouble, clients, asked = rolled(fleet, monkeypatch)
    (window,) = trouble.windows
    assert (window.what, window.server) == (ROLL, "decode-0") and window.end
    (router,) = fleet.routers
    told = router.log.read_text()
    assert f"told /remove_worker?url=http%3A%2F%2F127.0.0.1%3A{fleet.engine.url[-5:]}" in told
    while_away = {(host, port) for host, port, running in asked if not running}
    assert while_away == {("127.0.0.1", httpx.URL(router.url).port)}
    assert {outcome.kind for outcome in clients.outcomes} == {"greedy"}


def test_a_router_that_does_not_forget_ends_the_run(tmp_path, monkeypatch):
    fleet = Fleet(tmp_path, status=400)
    with pytest.raises(ServerError, match="router-0 keeps decode-0: 400"):
        rolled(fleet, monkeypatch)
