# SPDX-License-Identifier: Apache-2.0
"""The deployment under load: prefills, decodes, a stock router, and a plain vLLM as reference."""

import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lynx_connector.testbed.cluster import free_port, site_environment
from lynx_connector.testbed.launch import Role, console_script, is_cpu_build, serve_command
from lynx_connector.testbed.link import loopback
from lynx_connector.testbed.process import ServerError, ServerProcess
from tests.integration.pair import transfer_flag
from tests.soak import model
from tests.soak.kinds import MODEL
from tests.soak.transport_faults import SETTINGS_VARIABLE, write_plugin

ROOT = Path(__file__).parents[2]
LEASE_SECONDS = 20
TRANSFER_TIMEOUT_SECONDS = 10
SHUTDOWN_SECONDS = 30
HEALTH_SECONDS = 3
"""Between the router's looks at a server: it sends a request to a dead one for about so long."""
BLOCKS = {Role.PREFILL: 220, Role.DECODE: 120}
"""KV blocks of 128 tokens: enough for every client, not enough to keep every prompt."""
PREFILLS: tuple[dict[str, Any], ...] = (
    {"codec": "klt", "learn_tokens": 8192, "link_mbit": 100},
    {"codec": "hadamard", "early_reply": False, "link_mbit": 50},
)
"""What differs between prefills. The link is slow enough for decodes to draft."""


class Fleet:
    """Every server of a run, by name: `prefill-0`, `decode-1`, `router`, `reference`."""

    def __init__(
        self,
        folder: Path,
        prefills: int,
        decodes: int,
        *,
        adapters: bool,
        events: bool,
        settings: Path,
    ):
        self._folder = folder
        self._events = events
        self._model = model.write(folder / "model")
        self._common = [
            *("--host", "127.0.0.1", "--dtype", "float32", "--served-model-name", MODEL),
            *("--max-model-len", str(model.MAX_MODEL_LEN), "--max-num-seqs", "24"),
        ]
        self._cpu = is_cpu_build()
        if self._cpu:
            self._common.append("--enforce-eager")
        if adapters:
            self._common += model.adapter_arguments(self._model)
        plugin = write_plugin(folder / "plugin", adapters)
        self._environment = {
            **os.environ,
            **site_environment(str(self._model), loopback(0).prefill),
            "PYTHONPATH": os.pathsep.join(
                filter(None, (str(ROOT), str(plugin), os.environ.get("PYTHONPATH")))
            ),
            SETTINGS_VARIABLE: str(settings),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "OMP_NUM_THREADS": "1",
        }
        cores = sorted(os.sched_getaffinity(0))
        self.prefills = [
            self._engine(Role.PREFILL, index, cores[index % len(cores)])
            for index in range(prefills)
        ]
        self.decodes = [
            self._engine(Role.DECODE, index, cores[-1 - index % len(cores)])
            for index in range(decodes)
        ]
        self.router = self.make_router("router")
        self.reference = self._reference(cores)

    @property
    def engines(self) -> list[ServerProcess]:
        """Prefills and decodes."""
        return [*self.prefills, *self.decodes]

    def replaceable(self, most: int) -> list[ServerProcess]:
        """Engines beside which there are others of their role, at most so many of each."""
        roles = (self.prefills, self.decodes)
        return [server for role in roles if len(role) > 1 for server in role[:most]]

    async def start_reference(self, timeout: float) -> None:
        """Start the plain server and wait for it."""
        self.reference.start()
        await ready([self.reference], timeout)

    async def start(self, timeout: float) -> None:
        """Start all but the reference.

        Raises:
            ServerError: one has died, or took longer than `timeout` seconds.
        """
        for server in self.engines:
            server.start()
        await ready(self.engines, timeout)
        self.router.start()
        await ready([self.router], 60)

    def stop(self) -> None:
        """Stop all that run."""
        running = [self.router, *self.engines, self.reference]
        for server in running:
            server.stop()

    def _engine(self, role: Role, index: int, core: int) -> ServerProcess:
        name = f"{role}-{index}"
        lynx: dict[str, Any] = {"tables_dir": str(self._folder / f"tables-{name}")}
        if self._events:
            lynx["events_file"] = str(self._folder / f"events-{name}.jsonl")
        if role is Role.PREFILL:
            lynx |= {
                # Bit for bit the prefill's cache: only so can a plain server be the reference.
                "final_tier": "exact",
                "frame_bytes": "64KiB",
                "lease_seconds": LEASE_SECONDS,
                # Full within the warm-up, or its filling would look like a leak.
                "reuse_bytes": "16MiB",
                "listen_port": free_port() % 30000 + 20000,
                "advertise_host": "127.0.0.1",
                **PREFILLS[index % len(PREFILLS)],
            }
        else:
            lynx["transfer_timeout_seconds"] = TRANSFER_TIMEOUT_SECONDS
        arguments = [
            *self._common,
            *transfer_flag(role.kv_role, "recompute", lynx),
            *("--num-gpu-blocks-override", str(BLOCKS[role])),
            # On SIGTERM what was begun is finished, and staged tiers are served.
            *("--shutdown-timeout", str(SHUTDOWN_SECONDS)),
            # A prefill of several chunks is answered before its end.
            *("--max-num-batched-tokens", "1024" if role is Role.PREFILL else "2048"),
        ]
        command = serve_command(role, str(self._model), arguments, cpu=self._cpu)
        return self._server(name, command, {"VLLM_CPU_OMP_THREADS_BIND": str(core)})

    def _reference(self, cores: Sequence[int]) -> ServerProcess:
        command = [console_script("vllm"), "serve", str(self._model), *self._common]
        # What a client sees of penalties and grammars, so that near ties show.
        command += ["--logprobs-mode", "processed_logprobs"]
        bind = ",".join(map(str, cores))
        return self._server("reference", command, {"VLLM_CPU_OMP_THREADS_BIND": bind})

    def _server(
        self, name: str, command: Sequence[str], environment: Mapping[str, str]
    ) -> ServerProcess:
        port = free_port()
        return ServerProcess(
            name,
            [*command, "--port", str(port)],
            f"http://127.0.0.1:{port}",
            self._folder / f"{name}.log",
            self._environment | environment,
        )

    def make_router(self, name: str) -> ServerProcess:
        """A router of all engines, to be started and stopped by who asks."""
        port = free_port()
        command = [console_script("vllm-router"), "--host", "127.0.0.1", "--port", str(port)]
        command += ["--prometheus-port", str(free_port()), "--vllm-pd-disaggregation"]
        for server in self.prefills:
            command += ["--prefill", server.url]
        for server in self.decodes:
            command += ["--decode", server.url]
        # A retry would hide a failure. A circuit breaker would hide a server that is back.
        command += ["--policy", "round_robin", "--disable-retries", "--disable-circuit-breaker"]
        command += ["--health-check-interval-secs", str(HEALTH_SECONDS)]
        # A busy machine answers late: a server that is merely slow has to stay in.
        command += ["--health-check-timeout-secs", "10", "--health-failure-threshold", "1"]
        command += ["--health-success-threshold", "1", "--log-level", "warning"]
        log = self._folder / f"{name}.log"
        environment = {**os.environ, "NO_PROXY": "*"}
        return ServerProcess(name, command, f"http://127.0.0.1:{port}", log, environment)


async def ready(servers: Sequence[ServerProcess], timeout: float) -> None:
    """Wait until each answers.

    Raises:
        ServerError: one has died, or took longer than `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    waiting = list(servers)
    while waiting:
        for server in list(waiting):
            server.check()
            if await asyncio.to_thread(server.healthy):
                waiting.remove(server)
            elif time.monotonic() > deadline:
                raise ServerError(f"{server.name} not ready in {timeout:.0f} s\n{server.tail()}")
        await asyncio.sleep(0.5)
