# SPDX-License-Identifier: Apache-2.0
"""Asks a prefill's bootstrap server what a decode leg in Mooncake's shape does not say.

In a thread of its own, so that the scheduler never waits for the network.
"""

from __future__ import annotations

import asyncio
import hmac
import threading
import time
from concurrent.futures import Future
from typing import Any

import httpx

from lynx_connector.errors import ProtocolError, TransferError, shown
from lynx_connector.wire.handoff import (
    BootstrapAnswer,
    MooncakeLeg,
    handoff_proof,
    parse_answer,
)
from lynx_connector.wire.secrets import NO_SECRETS, SharedSecrets

POLL_SECONDS = 10.0
"""How long the server may hold one question."""

ANSWER_SECONDS = 10.0
"""How long an answer may take beyond that."""

MAX_ANSWER_BYTES = 1 << 16


class BootstrapClient:
    """Resolves decode legs; the thread starts with the first one.

    Args:
        timeout_seconds: how long a prefill leg may stay away after its decode leg has come.
        secrets: one of them has to prove an answer.
    """

    def __init__(self, timeout_seconds: float, secrets: SharedSecrets = NO_SECRETS):
        self._secrets = secrets
        self._timeout = timeout_seconds
        self._loop: asyncio.AbstractEventLoop | None = None
        self._http: httpx.AsyncClient | None = None

    def resolve(self, leg: MooncakeLeg) -> Future[dict[str, Any]]:
        """The leg's handoff in the NIXL shape, once its prefill is scheduled.

        The future fails with TransferError, naming the server and the cause.
        """
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(
                target=self._run, args=[self._loop], name="lynx-bootstrap-client", daemon=True
            )
            self._thread.start()
        return asyncio.run_coroutine_threadsafe(self._resolve(leg), self._loop)

    def stop(self) -> None:
        """End the thread; what is not resolved is cancelled."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(timeout=5.0)

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.run_forever()
        loop.run_until_complete(self._close())
        loop.close()

    async def _close(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._http is not None:
            await self._http.aclose()

    async def _resolve(self, leg: MooncakeLeg) -> dict[str, Any]:
        where = leg.remote_bootstrap_addr
        deadline = time.monotonic() + self._timeout
        while True:
            wait = min(POLL_SECONDS, max(deadline - time.monotonic(), 0.0))
            answer = await self._ask(leg, wait)
            if answer.state == "ready":
                handoff = answer.handoff or {}
                if handoff.get("remote_engine_id") != leg.remote_engine_id:
                    found = shown(repr(handoff.get("remote_engine_id")))
                    raise TransferError(
                        f"bootstrap {where} is engine {found}, the decode leg wants "
                        f"{leg.remote_engine_id!r}"
                    )
                self._check_proof(leg, handoff, answer.proof)
                return handoff
            if answer.state == "failed":
                raise TransferError(f"bootstrap {where}: {shown(answer.cause, 256)}")
            if answer.state == "unknown" and time.monotonic() >= deadline:
                raise TransferError(
                    f"bootstrap {where}: no prefill leg with transfer_id {leg.transfer_id!r} "
                    f"within {self._timeout:g} s"
                )
            if wait < POLL_SECONDS:
                await asyncio.sleep(0.1)  # the prefill leg is there, but waits for its turn

    def _check_proof(self, leg: MooncakeLeg, handoff: dict[str, Any], proof: str) -> None:
        known = self._secrets.current()
        proofs = [handoff_proof(secret, leg.transfer_id, handoff) for secret in known]
        if known and not any(hmac.compare_digest(proof.encode(), one.encode()) for one in proofs):
            raise TransferError(
                f"bootstrap {leg.remote_bootstrap_addr}: its answer is not proved with the shared "
                "secret"
            )

    async def _ask(self, leg: MooncakeLeg, wait: float) -> BootstrapAnswer:
        where = leg.remote_bootstrap_addr
        if self._http is None:
            unlimited = httpx.Limits(max_connections=None, max_keepalive_connections=16)
            self._http = httpx.AsyncClient(limits=unlimited, timeout=None, trust_env=False)
        url = f"{where}/lynx/transfer"
        query: dict[str, str | float] = {"id": leg.transfer_id, "wait": wait}
        body = bytearray()
        try:
            async with (
                asyncio.timeout(wait + ANSWER_SECONDS),
                self._http.stream("GET", url, params=query) as reply,
            ):
                async for part in reply.aiter_raw():
                    body += part
                    if len(body) > MAX_ANSWER_BYTES:
                        raise TransferError(f"bootstrap {where}: the answer is too long")
        except TimeoutError:
            raise TransferError(f"bootstrap {where}: no answer") from None
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, UnicodeError) as error:
            raise TransferError(
                f"bootstrap {where}: {shown(str(error)) or type(error).__name__}"
            ) from None
        if reply.status_code != 200:
            raise TransferError(
                f"bootstrap {where}: HTTP status {reply.status_code}: is it a Lynx prefill?"
            )
        try:
            return parse_answer(body)
        except ProtocolError as error:
            raise TransferError(f"bootstrap {where}: {error}") from None
