# SPDX-License-Identifier: Apache-2.0
"""The servers of several modes, all on one link."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil

from lynx_connector.bench.e2e.modes import Mode, ServerSpec, server_specs
from lynx_connector.testbed.cluster import cores_of, free_port, site_environment
from lynx_connector.testbed.launch import Role, console_script, serve_command
from lynx_connector.testbed.link import Link
from lynx_connector.testbed.process import ServerError, ServerProcess

#: What a server takes beside weights and KV cache: three processes' worth of Python and vLLM.
_BASE_BYTES = int(1.7 * 2**30)
#: A prefill's last chunk is what streaming leaves to travel: kept short, for all modes alike.
CHUNK_TOKENS = 512


@dataclass(frozen=True)
class ServerOptions:
    """What all servers have in common."""

    model: str
    dtype: str
    max_model_len: int
    kv_bytes: int
    logs: Path
    """Folder for logs and events files."""

    @property
    def server_bytes(self) -> int:
        """Memory of one server, about: all of its KV cache may be staged beside it."""
        weights = sum(file.stat().st_size for file in Path(self.model).glob("*.safetensors"))
        return _BASE_BYTES + weights + 2 * self.kv_bytes


class Fleet:
    """Every server that some modes need. Ended on the way out, whatever happens."""

    def __init__(self, modes: Sequence[Mode], link: Link, options: ServerOptions):
        self._link = link
        self._options = options
        self._specs = {mode.name: mode.specs(link.sender_mbit) for mode in modes}
        self._servers: dict[ServerSpec, ServerProcess] = {}
        self.events_files: list[Path] = []
        for number, spec in enumerate(server_specs(modes, link.sender_mbit)):
            self._servers[spec] = self._server(f"{number}-{spec.role}", spec)

    def of(self, mode: Mode) -> tuple[ServerProcess, ServerProcess]:
        """(prefill, decode) of a mode, the same server twice where one does both."""
        servers = [self._servers[spec] for spec in self._specs[mode.name]]
        return servers[0], servers[-1]

    def only(self, mode: Mode) -> None:
        """Let the servers of one mode run and hold all others still.

        Idle is not enough: NIXL's progress threads poll, a core for each server.
        """
        mine = self.of(mode)
        for server in self._servers.values():
            server.kill(signal.SIGCONT if server in mine else signal.SIGSTOP)

    def start(self, timeout: float, waiting: Callable[[int, int], None]) -> None:
        """Start all at once and return when each answers; `waiting(ready, all)` meanwhile.

        Raises:
            ServerError: one died or took longer than `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        pending = list(self._servers.values())
        for server in pending:
            server.start()
        while pending:
            for server in list(pending):
                server.check()
                if server.healthy():
                    pending.remove(server)
                elif time.monotonic() > deadline:
                    raise ServerError(
                        f"{server.name} not ready after {timeout:.0f} s\n{server.tail()}"
                    )
            waiting(len(self._servers) - len(pending), len(self._servers))
            time.sleep(0.5)

    def check(self) -> None:
        """Raise ServerError, with the end of its log, where a server has died."""
        for server in self._servers.values():
            server.check()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers.values():
            server.kill(signal.SIGCONT)
        with ThreadPoolExecutor(len(self._servers)) as pool:
            list(pool.map(ServerProcess.stop, self._servers.values()))

    def _server(self, name: str, spec: ServerSpec) -> ServerProcess:
        options, link = self._options, self._link
        site = link.prefill if spec.role is Role.PREFILL else link.decode
        port = free_port()
        arguments = ["--host", site.http_host, "--port", str(port), "--dtype", options.dtype]
        arguments += ["--max-model-len", str(options.max_model_len), "--enforce-eager"]
        arguments += ["--kv-cache-memory-bytes", str(options.kv_bytes)]
        arguments += ["--max-num-batched-tokens", str(CHUNK_TOKENS)]
        arguments += ["--served-model-name", "bench"]
        environment = {
            **os.environ,
            **site_environment(options.model, site),
            "VLLM_CPU_OMP_THREADS_BIND": cores_of(spec.role),
            "OMP_NUM_THREADS": "1",
            "VLLM_NIXL_SIDE_CHANNEL_HOST": site.kv_host,
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
        }
        # It would win over --kv-cache-memory-bytes.
        environment.pop("VLLM_CPU_KVCACHE_SPACE", None)
        if spec.lynx:
            events = (options.logs / f"events-{name}.jsonl").resolve()
            self.events_files.append(events)
            config = json.loads(spec.transfer_config)
            extra = config.setdefault("kv_connector_extra_config", {})
            extra["events_file"] = str(events)
            if spec.role is Role.PREFILL:
                extra["advertise_host"] = site.kv_host
            arguments += ["--kv-transfer-config", json.dumps(config)]
            command = serve_command(spec.role, options.model, arguments, cpu=True)
        else:
            command = [console_script("vllm"), "serve", options.model, *arguments]
            if spec.transfer_config:
                command += ["--kv-transfer-config", spec.transfer_config]
        url = f"http://{site.http_host}:{port}"
        log = options.logs / f"{name}.log"
        return ServerProcess(name, [*site.prefix, *command], url, log, environment)


def cpu_seconds(server: ServerProcess) -> float:
    """User and system time of a server and all its processes so far."""
    total = 0.0
    with contextlib.suppress(psutil.NoSuchProcess):
        top = psutil.Process(server.pid)
        for process in (top, *top.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
    return total
