# SPDX-License-Identifier: Apache-2.0
"""One request, streamed or not, and what came of it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx


class RequestError(Exception):
    """No whole answer; `status` is 0 where there was no HTTP answer at all."""

    def __init__(self, status: int, cause: str):
        super().__init__(f"{status or 'connection'}: {cause}")
        self.status = status


@dataclass
class Choice:
    """One choice of an answer."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    finish: str | None = None
    gaps: list[float] = field(default_factory=list)
    """How far the best token was ahead of the second, in nats, where log probabilities came."""
    logprobs: list[float] = field(default_factory=list)
    """Of each token, where they came."""


@dataclass
class Answer:
    """Choices in order of their index, and the handoff of a prefill leg."""

    choices: list[Choice]
    kv_transfer_params: dict[str, Any] | None = None


def new_client(connections: int) -> httpx.AsyncClient:
    """A client without time limits: who waits for an answer decides for how long."""
    # Servers close a connection that was idle for five seconds: not to meet them at that.
    limits = httpx.Limits(
        max_connections=connections, max_keepalive_connections=connections, keepalive_expiry=2
    )
    # Without the environment's proxies; a connection refused is told at once.
    return httpx.AsyncClient(
        timeout=httpx.Timeout(None, connect=30), limits=limits, trust_env=False
    )


async def ask(
    client: httpx.AsyncClient, url: str, path: str, body: Mapping[str, Any], stream: bool = False
) -> Answer:
    """POST `body` and wait for the whole answer.

    Raises:
        RequestError: an HTTP error, an error or a cut in the stream, no connection.
    """
    body = {**body, "return_token_ids": True}
    try:
        if stream:
            return await _stream(client, url + path, body | {"stream": True})
        reply = await client.post(url + path, json=body)
        if reply.status_code != 200:
            raise RequestError(reply.status_code, reply.text[:500])
        return _whole(reply.json())
    except httpx.HTTPError as error:
        raise RequestError(0, f"{type(error).__name__}: {error}") from error
    except ValueError as error:
        raise RequestError(0, f"not JSON: {error}") from error


def _whole(reply: dict[str, Any]) -> Answer:
    choices: dict[int, Choice] = {}
    for part in reply["choices"]:
        _add(choices, part, part.get("message", {}).get("content"))
    return _answer(choices, reply.get("kv_transfer_params"))


async def _stream(client: httpx.AsyncClient, address: str, body: dict[str, Any]) -> Answer:
    choices: dict[int, Choice] = {}
    async with client.stream("POST", address, json=body) as reply:
        if reply.status_code != 200:
            raise RequestError(reply.status_code, (await reply.aread()).decode()[:500])
        async for line in reply.aiter_lines():
            data = line.removeprefix("data: ")
            if data in (line, "[DONE]"):
                continue
            event = json.loads(data)
            if "error" in event:
                raise RequestError(0, f"in the stream: {event['error']}"[:500])
            for part in event.get("choices", ()):
                _add(choices, part, part.get("delta", {}).get("content"))
    return _answer(choices, None)


def _add(choices: dict[int, Choice], part: dict[str, Any], content: str | None) -> None:
    choice = choices.setdefault(part["index"], Choice())
    choice.text += content or part.get("text") or ""
    choice.ids += part.get("token_ids") or []
    choice.finish = part.get("finish_reason") or choice.finish
    logprobs = part.get("logprobs") or {}
    if "content" in logprobs:  # a chat
        for token in logprobs["content"] or ():
            _add_logprob(choice, token["logprob"], [t["logprob"] for t in token["top_logprobs"]])
    elif "token_logprobs" in logprobs:
        for own, top in zip(
            logprobs["token_logprobs"], logprobs.get("top_logprobs") or (), strict=False
        ):
            _add_logprob(choice, own, list((top or {}).values()))


def _add_logprob(choice: Choice, own: float, top: list[float]) -> None:
    best = sorted(top, reverse=True)[:2]
    choice.logprobs.append(own)
    choice.gaps.append(best[0] - best[1] if len(best) == 2 else 0.0)


def _answer(choices: dict[int, Choice], params: dict[str, Any] | None) -> Answer:
    answer = Answer([choices[index] for index in sorted(choices)], params)
    if not answer.choices:
        raise RequestError(0, "an answer without a choice")
    if any(choice.finish is None for choice in answer.choices):
        raise RequestError(0, "the answer ended before its finish_reason")
    if any(choice.finish == "abort" for choice in answer.choices):
        raise RequestError(0, "aborted by a server that ends")
    return answer
