# SPDX-License-Identifier: Apache-2.0
"""A client that streams a chat answer and notes when each token arrived."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx


class RequestError(RuntimeError):
    """The request failed; the message is what the server said."""


@dataclass
class Answer:
    """What has arrived of one answer."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    token_times: list[float] = field(default_factory=list)
    """Unix time at which each token of `token_ids` arrived."""
    finish_reason: str | None = None


def stream_chat(
    url: str, body: Mapping[str, Any], answer: Answer | None = None, timeout: float = 180
) -> Answer:
    """POST `body` to /v1/chat/completions at `url`, streaming into `answer`, which is returned.

    Raises:
        RequestError: an HTTP error, an error in the stream, or silence of `timeout` seconds.
    """
    return _stream(f"{url}/v1/chat/completions", body, answer or Answer(), timeout)


def stream_completion(url: str, body: Mapping[str, Any], timeout: float = 180) -> Answer:
    """As `stream_chat`, to /v1/completions."""
    return _stream(f"{url}/v1/completions", body, Answer(), timeout)


def _stream(address: str, body: Mapping[str, Any], answer: Answer, timeout: float) -> Answer:
    request = {**body, "stream": True, "return_token_ids": True}
    try:
        with (
            httpx.Client(timeout=timeout, trust_env=False) as client,
            client.stream("POST", address, json=request) as reply,
        ):
            if reply.status_code != 200:
                reply.read()
                raise RequestError(f"{address} answered {reply.status_code}: {reply.text[:500]}")
            for line in reply.iter_lines():
                data = line.removeprefix("data: ")
                if data != line and data != "[DONE]":
                    _take(answer, json.loads(data), time.time())
    except httpx.HTTPError as error:
        raise RequestError(f"{address}: {type(error).__name__}: {error}") from error
    if answer.finish_reason is None:
        raise RequestError(f"{address}: the stream ended after {len(answer.token_ids)} tokens")
    return answer


def _take(answer: Answer, chunk: dict[str, Any], now: float) -> None:
    if "error" in chunk:
        raise RequestError(str(chunk["error"].get("message", chunk["error"])))
    for choice in chunk.get("choices", ()):
        content = choice["delta"].get("content") if "delta" in choice else choice["text"]
        answer.text += content or ""
        ids = choice.get("token_ids") or []
        answer.token_ids += ids
        answer.token_times += [now] * len(ids)
        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
