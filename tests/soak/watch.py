# SPDX-License-Identifier: Apache-2.0
"""What servers hold, over time and at rest: memory, file descriptors, threads, blocks, staging."""

import asyncio
import contextlib
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from lynx_connector.testbed.process import ServerProcess
from tests.soak.client import RequestError, ask, new_client
from tests.soak.kinds import COMPLETIONS, MODEL

IDLE_SECONDS = 8.0
"""For how long nothing must have been asked before descriptors are counted: servers keep idle HTTP
connections for five seconds."""
GAUGES = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:kv_cache_usage_perc": "kv_usage",
    "vllm:lynx_staging_used_bytes": "staging_bytes",
    "vllm:lynx_open_transfers": "open_transfers",
    "vllm:lynx_connections": "connections",
}
MUST_BE_ZERO = ("running", "waiting", "kv_usage", "staging_bytes", "open_transfers")
COUNTERS = {
    "vllm:lynx_requests_total": "start",
    "vllm:lynx_verifications_total": "path",
    "vllm:lynx_failures_total": "cause",
    "vllm:lynx_prefills_total": "outcome",
    "vllm:num_preemptions_total": "",
    "vllm:lynx_drafted_tokens_total": "",
    "vllm:lynx_accepted_tokens_total": "",
    "vllm:lynx_reused_tokens_total": "",
}
"""Metric to the label by which it is told apart."""


@dataclass
class Sample:
    """One server at one moment. `process` tells a restarted server from its former self."""

    t: float
    server: str
    process: int
    rss_mb: float
    """Of all its processes together, shared pages counted in each."""
    fds: int
    threads: int
    gauges: dict[str, float] = field(default_factory=dict)


@dataclass
class Rest:
    """What was there when nothing was asked: `left` names what ought to be gone."""

    t: float
    samples: list[Sample]
    left: list[str]


class Watch:
    """Samples of some servers."""

    def __init__(self, servers: list[ServerProcess]):
        self.samples: list[Sample] = []
        self.rests: list[Rest] = []
        self._servers = servers
        self._trees: dict[int, list[psutil.Process]] = {}
        self._counters: dict[tuple[str, int], Counter[str]] = {}

    async def run(self, every: float) -> None:
        """Sample every `every` seconds until cancelled."""
        async with new_client(8) as http:
            while True:
                await self._sample(http)
                await asyncio.sleep(every)

    async def rest(self, seconds: float) -> Rest:
        """Wait up to `seconds` until nothing is left anywhere, then count. To be called when
        nothing is open."""
        async with new_client(8) as http:
            deadline = time.monotonic() + seconds
            while left := await self._left(http):
                if time.monotonic() > deadline:
                    break
                await asyncio.sleep(1.0)
        await asyncio.sleep(IDLE_SECONDS)
        async with new_client(8) as http:
            samples = await self._sample(http)
        rest = Rest(time.time(), samples, left)
        self.rests.append(rest)
        return rest

    def counted(self) -> dict[str, int]:
        """Counters of all processes that ever ran, added up as far as they were seen."""
        total: Counter[str] = Counter()
        for counters in self._counters.values():
            total.update(counters)
        return {name: int(total[name]) for name in sorted(total)}

    async def _sample(self, http: httpx.AsyncClient) -> list[Sample]:
        metrics = await asyncio.gather(*(self._metrics(http, server) for server in self._servers))
        samples = []
        for server, gauges in zip(self._servers, metrics, strict=True):
            if (sample := self._measure(server)) is not None:
                sample.gauges = gauges
                samples.append(sample)
        self.samples += samples
        return samples

    def _measure(self, server: ServerProcess) -> Sample | None:
        if not server.running or server.pid is None:
            return None
        tree = self._trees.get(server.pid, [])
        with contextlib.suppress(psutil.Error):
            if len(tree) < 4:  # processes of a server that starts come one by one
                root = psutil.Process(server.pid)
                tree = self._trees[server.pid] = [root, *root.children(recursive=True)]
        sample = Sample(time.time(), server.name, server.pid, 0.0, 0, 0)
        for process in tree:
            with contextlib.suppress(psutil.Error), process.oneshot():
                sample.rss_mb += process.memory_info().rss / 2**20
                sample.fds += process.num_fds()
                sample.threads += process.num_threads()
        return sample

    async def _metrics(self, http: httpx.AsyncClient, server: ServerProcess) -> dict[str, float]:
        if not server.running or server.name == "router":
            return {}
        try:
            reply = await http.get(f"{server.url}/metrics", timeout=2)
        except httpx.HTTPError:
            return {}  # it starts, hangs, or is on its way out
        gauges: dict[str, float] = {}
        counters: Counter[str] = Counter()
        for family in text_string_to_metric_families(reply.text):
            for line in family.samples:
                if line.name in GAUGES:
                    name = GAUGES[line.name]
                    gauges[name] = gauges.get(name, 0.0) + line.value
                elif line.name in COUNTERS:
                    label = line.labels.get(COUNTERS[line.name], "")
                    role = server.name.partition("-")[0]
                    name = line.name.removeprefix("vllm:").removeprefix("lynx_")
                    counters[f"{role} {name.removesuffix('_total')} {label}".strip()] += line.value
        self._counters[server.name, server.pid or 0] = counters
        return gauges

    async def _left(self, http: httpx.AsyncClient) -> list[str]:
        left = []
        for server in self._servers:
            if server.name != "router":
                left += [f"{server.name}: {what}" for what in await self._left_on(http, server)]
        return left

    async def _left_on(self, http: httpx.AsyncClient, server: ServerProcess) -> list[str]:
        """What one engine still holds. Its gauges are those of its last step, so it gets one."""
        step: dict[str, Any] = {"model": MODEL, "prompt": [5], "max_tokens": 2, "temperature": 0}
        try:
            async with asyncio.timeout(60):
                await ask(http, server.url, COMPLETIONS, step)
                # The step's own numbers are out a moment after its answer.
                await asyncio.sleep(0.5)
                gauges = await self._metrics(http, server)
                reply = await http.post(f"{server.url}/reset_prefix_cache", timeout=30)
        except (RequestError, httpx.HTTPError, TimeoutError) as error:
            return [f"no answer: {type(error).__name__} {error}"]
        left = [f"{name} {gauges[name]:g}" for name in MUST_BE_ZERO if gauges.get(name)]
        if not gauges:
            left.append("no metrics")
        if reply.status_code != 200 or not reply.json().get("success", True):
            left.append("blocks that cannot be forgotten")
        return left
