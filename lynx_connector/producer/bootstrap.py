# SPDX-License-Identifier: Apache-2.0
"""HTTP server of a prefill instance for routers that speak Mooncake's handoff.

There the router names the transfer (`transfer_id`) and tells the decode instance nothing but that
name and this server, possibly before the prefill has begun. Two resources:

    GET /query                           what the router asks for, in Mooncake's shape
    GET /lynx/transfer?id=ID&wait=SECS   `BootstrapAnswer`: what a reply in the NIXL shape would
                                         have said, as soon as that is known

It runs in a thread of the process that has the scheduler half.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import msgspec

from lynx_connector.errors import ConfigError, TransferError
from lynx_connector.transport.ports import listen
from lynx_connector.wire.handoff import BootstrapAnswer, handoff_proof
from lynx_connector.wire.secrets import NO_SECRETS, SharedSecrets

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

logger = logging.getLogger("vllm.lynx.bootstrap")

MAX_REMEMBERED = 4096
"""Transfers that can still be asked for, newest first; an id may not come twice among them."""

MAX_WAIT_SECONDS = 30.0


class BootstrapServer:
    """Answers from its start to `stop`. `expect`, `publish` and `fail` are the scheduler's.

    Args:
        port: TCP port; 0 takes any free one.
        engine_id: vLLM's id of this engine.
        host: whose interfaces it listens on; empty: all.
        secrets: what its answers are proved with.

    Raises:
        ConfigError: if the port stays taken, or the host is not this one's.
    """

    def __init__(
        self, port: int, engine_id: str, host: str = "", secrets: SharedSecrets = NO_SECRETS
    ):
        self._secrets = secrets
        try:
            self._sockets = asyncio.run(listen(host, port))
        except TransferError as error:
            raise ConfigError(
                f"kv_connector_extra_config.bootstrap_port = {port}: {error}"
            ) from None
        self.port = self._sockets[0].getsockname()[1]
        self._engine_id = engine_id
        self._addresses: list[str] = []
        self._answers: OrderedDict[str, BootstrapAnswer] = OrderedDict()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lynx-bootstrap", daemon=True)
        self._thread.start()
        self._ready.wait()
        logger.info("lynx: bootstrap server for Mooncake's handoff on port %d", self.port)

    def set_workers(self, addresses: list[str]) -> None:
        """Where the workers listen ("host:port"), by rank."""
        self._addresses = addresses

    # ---- scheduler thread -------------------------------------------------------------------

    def expect(self, transfer_id: str) -> bool:
        """A prefill leg has come; False if its id was used before."""
        if transfer_id in self._answers:
            return False
        self._put(transfer_id, BootstrapAnswer("pending"))
        return True

    def publish(self, transfer_id: str, handoff: dict[str, Any]) -> None:
        """The transfer can be fetched from now on."""
        known = self._secrets.current()
        proof = handoff_proof(known[0], transfer_id, handoff) if known else ""
        self._put(transfer_id, BootstrapAnswer("ready", handoff=handoff, proof=proof))

    def fail(self, transfer_id: str, cause: str) -> None:
        """The transfer will never be there."""
        self._put(transfer_id, BootstrapAnswer("failed", cause=cause))

    def _put(self, transfer_id: str, answer: BootstrapAnswer) -> None:
        self._answers[transfer_id] = answer
        while len(self._answers) > MAX_REMEMBERED:
            self._answers.popitem(last=False)
        self._loop.call_soon_threadsafe(self._wake)

    def stop(self) -> None:
        """Close the port; waiting clients lose their connection."""
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(timeout=5.0)
        for sock in self._sockets:
            sock.close()

    # ---- server thread ----------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        import uvicorn
        from starlette.applications import Starlette
        from starlette.routing import Route

        from lynx_connector.producer.bounded_http import MAX_CONNECTIONS, BoundedProtocol

        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        app = Starlette(
            routes=[
                Route("/query", self._query),
                Route("/lynx/transfer", self._transfer),
            ]
        )
        config = uvicorn.Config(
            app,
            http=BoundedProtocol,
            limit_concurrency=MAX_CONNECTIONS,
            log_config=None,
            access_log=False,
            lifespan="off",
        )
        self._server = uvicorn.Server(config)
        self._ready.set()
        await self._server.serve(sockets=self._sockets)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _query(self, request: Request) -> Response:
        from starlette.responses import JSONResponse

        workers = {str(rank): {"0": address} for rank, address in enumerate(self._addresses)}
        return JSONResponse({"0": {"engine_id": self._engine_id, "worker_addr": workers}})

    async def _transfer(self, request: Request) -> Response:
        from starlette.responses import Response

        query = request.query_params
        answer = await self._settled(query.get("id", ""), _seconds(query.get("wait")))
        return Response(msgspec.json.encode(answer), media_type="application/json")

    async def _settled(self, transfer_id: str, seconds: float) -> BootstrapAnswer:
        """The answer once it is final, or what there is after `seconds`."""
        deadline = self._loop.time() + seconds
        while True:
            changed = self._changed
            answer = self._answers.get(transfer_id, BootstrapAnswer("unknown"))
            left = deadline - self._loop.time()
            if answer.state in ("ready", "failed") or left <= 0:
                return answer
            try:
                await asyncio.wait_for(changed.wait(), left)
            except TimeoutError:
                continue


def _seconds(text: str | None) -> float:
    try:
        return min(max(float(text or 0), 0.0), MAX_WAIT_SECONDS)
    except ValueError:
        return 0.0
