# SPDX-License-Identifier: Apache-2.0
"""Measures one cell of one mode, doing itself what a router does between the two servers."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx

from lynx_connector.bench.e2e.cells import Cell
from lynx_connector.bench.e2e.modes import Mode
from lynx_connector.bench.e2e.rows import OUTPUT_TOKENS, Row, make_row
from lynx_connector.bench.e2e.servers import Fleet, cpu_seconds
from lynx_connector.testbed.client import RequestError, stream_completion
from lynx_connector.testbed.cluster import forget_prefixes
from lynx_connector.testbed.link import Link, carried_bytes
from lynx_connector.testbed.process import ServerProcess
from lynx_connector.testbed.trace import EventTail, Trace

_PREFILL_LEG = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
_EVENTS_GRACE_SECONDS = 5.0
_TIMEOUT = 1800.0


@dataclass(frozen=True)
class Served:
    """One request that was answered."""

    sent: float
    replied: float
    """When the prefill answered, Unix time; as `sent` where there was no prefill leg."""
    token_times: list[float]
    transfer: str


class Meter:
    """Measures on one fleet."""

    def __init__(self, fleet: Fleet, link: Link):
        self._fleet = fleet
        self._link = link
        self._tail = EventTail(fleet.events_files)
        self.codecs: dict[str, dict[str, int]] = {}
        """By mode: how many requests went by which codec."""

    def warm_up(self, mode: Mode, prompt: Sequence[int]) -> None:
        """One request that is not counted: it pays for connections and compiled kernels."""
        self._fleet.only(mode)
        self._serve(mode, prompt)

    def measure(self, mode: Mode, cell: Cell, prompts: Sequence[Sequence[int]]) -> list[Row]:
        """Send the prompts at once; one row each.

        Raises:
            ServerError: a server died.
            RequestError: a request failed.
            BenchError: an answer is too short.
        """
        self._fleet.only(mode)
        try:
            self._prepare(mode, cell, prompts)
            servers = set(self._fleet.of(mode))
            cpu, wire = sum(map(cpu_seconds, servers)), self._wire()
            with ThreadPoolExecutor(len(prompts)) as pool:
                served = list(pool.map(lambda prompt: self._serve(mode, prompt), prompts))
            traces = [self._trace(request) if mode.is_lynx else None for request in served]
            cpu = sum(map(cpu_seconds, servers)) - cpu
            wire = self._wire() - wire
        except (httpx.HTTPError, RequestError):
            self._fleet.check()  # a server that died is the cause to tell
            raise
        rows = []
        for request, trace in zip(served, traces, strict=True):
            own_wire = wire // len(served)
            if self._link.kind != "netns":
                own_wire = sum(trace.wire_bytes.values()) if trace else 0
            drafts = _drafts(trace)
            if trace is not None:
                codecs = self.codecs.setdefault(mode.name, {})
                codec = trace.value("handoff", "codec", "?")
                codecs[codec] = codecs.get(codec, 0) + 1
            zero = prefill_end(mode, cell, request, trace)
            own_cpu = cpu / len(served)
            rows.append(
                make_row(mode.name, cell, zero, request.token_times, drafts, own_wire, own_cpu)
            )
        return rows

    def _prepare(self, mode: Mode, cell: Cell, prompts: Sequence[Sequence[int]]) -> None:
        prefill, decode = self._fleet.of(mode)
        if cell.prefill == "cold":
            forget_prefixes(prefill)
        else:
            for prompt in prompts:
                _post(prefill, {"prompt": prompt, "max_tokens": 1})
        if decode is not prefill:
            forget_prefixes(decode)

    def _serve(self, mode: Mode, prompt: Sequence[int]) -> Served:
        prefill, decode = self._fleet.of(mode)
        body = {"model": "bench", "prompt": prompt, "temperature": 0}
        whole = {**body, "ignore_eos": True, "max_tokens": OUTPUT_TOKENS, **mode.request}
        sent = replied = time.time()
        transfer = ""
        if mode.connector is not None:
            request_id = uuid.uuid4().hex
            leg = {"max_tokens": 1, "min_tokens": 1, "kv_transfer_params": _PREFILL_LEG}
            reply = _post(prefill, {**body, **leg, "request_id": f"p-{request_id}"})
            replied = time.time()
            parameters = reply.get("kv_transfer_params")
            if not parameters:
                raise RequestError(f"{prefill.name} handed nothing over: {str(reply)[:300]}")
            transfer = parameters.get("remote_request_id", "")
            whole |= {"kv_transfer_params": parameters, "request_id": f"d-{request_id}"}
        answer = stream_completion(decode.url, whole, timeout=_TIMEOUT)
        return Served(sent, replied, answer.token_times, transfer)

    def _trace(self, request: Served) -> Trace | None:
        """The request's events, once the last of them is written."""
        deadline = time.monotonic() + _EVENTS_GRACE_SECONDS
        while True:
            events = [e for e in self._tail.poll() if e.get("transfer") == request.transfer]
            trace = Trace("", events)
            if trace.find("finished") or time.monotonic() > deadline:
                return trace
            time.sleep(0.02)

    def _wire(self) -> int:
        return carried_bytes(self._link) if self._link.kind == "netns" else 0


def prefill_end(mode: Mode, cell: Cell, request: Served, trace: Trace | None) -> float:
    """The Unix time from which a request's tokens are counted: its prefill is complete.

    That is the prefill's reply; after an early reply the end of the prefill, which its scheduler
    notes as `prefilled`. A single server gives no reply: cold, its prefill is complete with the
    first token; cached, there is nothing to prefill, and all of its time counts.
    """
    if mode.connector is None:
        return request.token_times[0] if cell.prefill == "cold" else request.sent
    if trace is not None and trace.value("handoff", "early", False):
        return max(request.replied, trace.time("prefilled") or request.replied)
    return request.replied


def _drafts(trace: Trace | None) -> tuple[int, int]:
    if trace is None:
        return 0, 0
    return trace.value("verified", "drafted", 0), trace.value("verified", "accepted", 0)


def _post(server: ServerProcess, body: dict[str, Any]) -> dict[str, Any]:
    address = f"{server.url}/v1/completions"
    request = {"model": "bench", "temperature": 0, **body}
    reply = httpx.post(address, json=request, timeout=_TIMEOUT, trust_env=False)
    if reply.status_code != 200:
        raise RequestError(f"{server.name}: {address} answered {reply.status_code}: {reply.text}")
    answer: dict[str, Any] = reply.json()
    return answer
