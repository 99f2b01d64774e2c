# SPDX-License-Identifier: Apache-2.0
"""ASGI middleware for `vllm serve --middleware lynx_connector.middleware.LynxMiddleware`.

vLLM 0.32 answers every request whose transfer failed with "Internal server error". Here the client
gets the cause, as an error or as the last chunk of a stream; and what cannot be a handoff is
HTTP 400. Requests without `kv_transfer_params` pass untouched.
"""

from __future__ import annotations

import functools
import json
import logging
from typing import TYPE_CHECKING, Any

import msgspec

from lynx_connector.config import LynxConfig
from lynx_connector.engine.answers import ANSWERS
from lynx_connector.errors import MalformedError, NotAllowedError, ProtocolError
from lynx_connector.telemetry.failures import explain
from lynx_connector.telemetry.metrics import CONSUMER, PRODUCER
from lynx_connector.wire.allowed import AllowedPrefills
from lynx_connector.wire.handoff import (
    check_transfer_id,
    parse_handoff,
    parse_mooncake_leg,
    whereabouts,
)

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
    from vllm.config import KVTransferConfig

logger = logging.getLogger("vllm.lynx")

_KEY = b'"kv_transfer_params"'
_UNEXPLAINED = "Internal server error"
"""What vLLM says (entrypoints/generate/base/serving.py, `_raise_if_error`)."""

_ERROR_CHUNK = b'data: {"error"'


class _Body(msgspec.Struct):
    kv_transfer_params: Any = None


class LynxMiddleware:
    """Explains failed transfers to HTTP clients, and refuses handoffs that cannot be read."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            exchange = _Exchange(scope, receive, send)
            receive, send = exchange.receive, exchange.send
        await self._app(scope, receive, send)


class _Exchange:
    """One request and its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send):
        scope.setdefault("state", {})  # where vLLM leaves the request's id
        self._scope = scope
        self._receive, self._send = receive, send
        self._parts: list[bytes] = []
        self._read = False
        self._followed = False
        """It carries `kv_transfer_params`."""
        self._malformed: str | None = None
        """Why it is refused once the engine has given its transfer back."""
        self._held: Message | None = None
        """The beginning of an answer that is about to be replaced."""
        self._answer: list[bytes] = []
        self._streams = False

    # ---- request -------------------------------------------------------------------------------

    async def receive(self) -> Message:
        """Pass the body on, and look into it once it is whole."""
        message = await self._receive()
        if not self._read and message["type"] == "http.request":
            self._parts.append(message.get("body", b""))
            if not message.get("more_body", False):
                self._read = True
                body, self._parts = b"".join(self._parts), []
                if _KEY in body:
                    self._look(body)
        return message

    def _look(self, body: bytes) -> None:
        try:
            params = msgspec.json.decode(body, type=_Body).kv_transfer_params
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            return  # vLLM says what is wrong with it
        if not isinstance(params, dict):
            return
        self._followed = True
        transfer = _transfer_config(self._scope)
        if transfer is not None and params.get("do_remote_prefill"):
            try:
                _allowed(transfer).check_params(params)
            except NotAllowedError as error:
                self._refuse(CONSUMER, "not_allowed", error)
        if transfer is None or transfer.kv_load_failure_policy == "recompute":
            return  # computed there, whatever the handoff is
        role = CONSUMER if params.get("do_remote_prefill") else PRODUCER
        try:
            _check(params, transfer)
        except MalformedError as error:
            if role == CONSUMER and whereabouts(params) is not None:
                logger.warning("lynx: %s is refused: %s", self._scope["path"], error)
                self._malformed = explain(str(error))  # the engine gives the transfer back
                return
            self._refuse(role, "malformed", error)
        except ProtocolError:
            return  # the sides differ: no fault of this request's

    def _refuse(self, role: str, code: str, error: ProtocolError) -> None:
        """HTTP 400, before the engine has seen the request."""
        from fastapi import HTTPException

        logger.warning("lynx: %s is refused: %s", self._scope["path"], error)
        ANSWERS.count_refused(role, code)
        raise HTTPException(400, explain(str(error))) from None

    # ---- answer --------------------------------------------------------------------------------

    async def send(self, message: Message) -> None:
        """Pass the answer on, with the cause in place of vLLM's words."""
        if not self._followed:
            await self._send(message)
        elif message["type"] == "http.response.start":
            await self._begin(message)
        elif message["type"] == "http.response.body":
            await self._go_on(message)
        else:
            await self._send(message)

    async def _begin(self, start: Message) -> None:
        headers = dict(start.get("headers", ()))
        self._streams = headers.get(b"content-type", b"").startswith(b"text/event-stream")
        if start["status"] == 500 or (self._malformed and start["status"] == 200):
            self._held = start
        else:
            await self._send(start)

    async def _go_on(self, message: Message) -> None:
        body = message.get("body", b"")
        if self._held is not None:
            self._answer.append(body)
            if not message.get("more_body", False):
                await self._replace(self._held, b"".join(self._answer))
        elif self._streams and body.startswith(_ERROR_CHUNK):
            first, end, rest = body.partition(b"\n\n")
            changed = await self._explained(first.removeprefix(b"data: "))
            await self._send({**message, "body": b"data: " + changed + end + rest})
        else:
            await self._send(message)

    async def _replace(self, start: Message, body: bytes) -> None:
        if self._malformed is not None:
            error = {"message": self._malformed, "type": "Bad Request", "param": None, "code": 400}
            body = json.dumps({"error": error}).encode()
            start = {"type": "http.response.start", "status": 400, "headers": []}
            start["headers"] = [(b"content-type", b"application/json")]
        else:
            body = await self._explained(body)
        headers = [(k, v) for k, v in start["headers"] if k.lower() != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        await self._send({**start, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    async def _explained(self, body: bytes) -> bytes:
        """vLLM's error with the cause as its message, where a transfer's failure is behind it."""
        try:
            answer = json.loads(body)
            if answer["error"]["message"] != _UNEXPLAINED:
                return body
        except (ValueError, LookupError, TypeError):
            return body
        metadata = self._scope["state"].get("request_metadata")
        sentence = await ANSWERS.find(metadata.request_id) if metadata is not None else None
        if sentence is None:
            return body
        answer["error"]["message"] = sentence
        return json.dumps(answer).encode()


def _transfer_config(scope: Scope) -> KVTransferConfig | None:
    """vLLM's, where Lynx alone reads the parameters; what others accept is not ours to refuse."""
    state = getattr(scope.get("app"), "state", None)
    transfer = getattr(getattr(state, "vllm_config", None), "kv_transfer_config", None)
    return transfer if transfer is not None and transfer.kv_connector == "LynxConnector" else None


def _allowed(transfer: KVTransferConfig) -> AllowedPrefills:
    entries = transfer.kv_connector_extra_config.get("allowed_prefills") or ()
    return _allowed_prefills(tuple(entries))


_allowed_prefills = functools.lru_cache(maxsize=4)(AllowedPrefills)


def _check(params: dict[str, Any], transfer: KVTransferConfig) -> None:
    """Raises:
    ProtocolError: the engine would end a request with these parameters with an error.
    """
    if params.get("do_remote_prefill"):
        if transfer.is_kv_consumer and parse_mooncake_leg(params) is None:
            parse_handoff(params)
    elif params.get("do_remote_decode") and params.get("transfer_id") is not None:
        extra = transfer.kv_connector_extra_config
        if transfer.is_kv_producer and LynxConfig.from_extra_config(extra).bootstrap_port:
            check_transfer_id(params["transfer_id"])
