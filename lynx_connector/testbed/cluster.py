# SPDX-License-Identifier: Apache-2.0
"""A prefill server, a decode server and a stock router on this machine, as real processes.

The demo and the integration tests use it:

    with open_link(200) as link, Cluster(model, folder, link=link) as cluster:
        cluster.start()
        httpx.post(f"{cluster.router.url}/v1/completions", json=...)
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from lynx_connector.testbed.launch import (
    Role,
    console_script,
    is_cpu_build,
    kv_transfer_config,
    serve_command,
)
from lynx_connector.testbed.link import Link, Site, loopback
from lynx_connector.testbed.process import ServerError, ServerProcess


@dataclass(frozen=True)
class Side:
    """What one of the two servers gets beyond the cluster's own settings."""

    lynx: Mapping[str, Any] = field(default_factory=dict)
    """Keys of `kv_connector_extra_config`."""
    vllm_args: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


class Cluster:
    """Prefill and decode server, and `vllm-router` in front of them unless `router` is False.

    Args:
        model: folder or hub name.
        folder: for logs (`prefill.log`, ...) and, per role, `events-ROLE.jsonl`.
        link: where the servers run; default: loopback without a limit.
        dtype: vLLM's `--dtype`.
        max_model_len: vLLM's `--max-model-len`.
        router: whether `start` starts a router.
        kv_cache_gib: KV cache of each server on CPU.
        prefill, decode: settings of one side.
    """

    def __init__(
        self,
        model: str | Path,
        folder: Path,
        *,
        link: Link | None = None,
        dtype: str = "auto",
        max_model_len: int = 8192,
        router: bool = True,
        kv_cache_gib: int = 1,
        prefill: Side | None = None,
        decode: Side | None = None,
    ):
        self.model = str(model)
        self.folder = folder
        self.link = link or loopback(0)
        self._common_args = ["--dtype", dtype, "--max-model-len", str(max_model_len)]
        self._kv_cache_gib = kv_cache_gib
        self._cpu = is_cpu_build()
        if self._cpu:
            self._common_args.append("--enforce-eager")  # compiling costs minutes of start-up
        self._gpus = 0 if self._cpu else _gpu_count()
        if self._gpus == 1:
            self._common_args += ["--gpu-memory-utilization", "0.4"]  # both servers share it
        self.prefill = self._server(Role.PREFILL, self.link.prefill, prefill or Side())
        self.decode = self._server(Role.DECODE, self.link.decode, decode or Side())
        self.router = self._router() if router else None

    @property
    def servers(self) -> list[ServerProcess]:
        """Every server, in the order of the chain from the client."""
        chain = [self.router, self.prefill, self.decode]
        return [server for server in chain if server is not None]

    @property
    def url(self) -> str:
        """Where a client sends its requests: the router, or the decode server without one."""
        return (self.router or self.decode).url

    def events_file(self, role: Role) -> Path:
        """The events file of that role's server."""
        return self.folder / f"events-{role}.jsonl"

    def start(
        self, timeout: float = 300, waiting: Callable[[dict[str, bool]], None] = lambda ready: None
    ) -> None:
        """Start all, the two vLLM servers at once, and return when each answers.

        `waiting` is called a few times a second with what is ready so far, by name.

        Raises:
            ServerError: one of them died or took longer than `timeout` seconds. What runs then
                keeps running until `stop`.
        """
        deadline = time.monotonic() + timeout
        ready = {server.name: False for server in self.servers}
        engines = [self.prefill, self.decode]
        for server in engines:
            server.start()
        while not all(ready[server.name] for server in engines):
            for server in engines:
                server.check()
                ready[server.name] = ready[server.name] or server.healthy()
                if time.monotonic() > deadline:
                    raise ServerError(
                        f"{server.name} not ready after {timeout:.0f} s\n{server.tail()}"
                    )
            waiting(ready)
            time.sleep(0.3)
        if self.router is not None:
            self.router.start()
            self.router.wait_ready(30)
            ready[self.router.name] = True
            waiting(ready)

    def stop(self) -> None:
        """Stop all of them; no process is left."""
        for server in self.servers:
            server.stop()

    def check(self) -> None:
        """Raise ServerError where one has died."""
        for server in self.servers:
            server.check()

    def reset_prefix_caches(self, timeout: float = 30) -> None:
        """Make both servers forget cached prefixes, so that a prompt is computed and sent again.

        Raises:
            ServerError: blocks were still in use after `timeout` seconds.
        """
        for server in (self.prefill, self.decode):
            forget_prefixes(server, timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _server(self, role: Role, site: Site, side: Side) -> ServerProcess:
        port = free_port()
        lynx: dict[str, Any] = {"events_file": str(self.events_file(role))}
        if role is Role.PREFILL:
            lynx["advertise_host"] = site.kv_host
            if self.link.sender_mbit:
                lynx["link_mbit"] = self.link.sender_mbit
        lynx.update(side.lynx)
        arguments = ["--host", site.http_host, "--port", str(port), *self._common_args]
        arguments += ["--kv-transfer-config", kv_transfer_config(role, lynx)]
        arguments += side.vllm_args
        command = serve_command(role, self.model, arguments, cpu=self._cpu)
        environment = {**os.environ, **self._environment(role, site), **side.environment}
        url = f"http://{site.http_host}:{port}"
        log = self.folder / f"{role}.log"
        return ServerProcess(str(role), [*site.prefix, *command], url, log, environment)

    def _environment(self, role: Role, site: Site) -> dict[str, str]:
        environment = site_environment(self.model, site)
        if self._cpu:
            environment["VLLM_CPU_KVCACHE_SPACE"] = str(self._kv_cache_gib)
            environment["VLLM_CPU_OMP_THREADS_BIND"] = cores_of(role)
            # For the front end; vLLM sets the engine's own from the binding.
            environment["OMP_NUM_THREADS"] = "1"
        elif self._gpus > 1:
            environment["CUDA_VISIBLE_DEVICES"] = "0" if role is Role.PREFILL else "1"
        return environment

    def _router(self) -> ServerProcess:
        return router_process(self.prefill.url, self.decode.url, self.folder / "router.log")


def router_process(
    prefill_url: str, decode_url: str, log: Path, bootstrap_port: int = 0
) -> ServerProcess:
    """A stock vllm-router, not started: with NIXL's handoff, or Mooncake's where there is a
    `bootstrap_port`."""
    port = free_port()
    command = [console_script("vllm-router"), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--prometheus-port", str(free_port()), "--vllm-pd-disaggregation"]
    command += ["--prefill", prefill_url]
    if bootstrap_port:
        command += [str(bootstrap_port), "--kv-connector", "mooncake"]
    # A retry would hide a failure, and count its time.
    command += ["--decode", decode_url, "--disable-retries"]
    environment = {**os.environ, "NO_PROXY": "*"}
    return ServerProcess("router", command, f"http://127.0.0.1:{port}", log, environment)


def site_environment(model: str, site: Site) -> dict[str, str]:
    """What a vLLM server at `site` needs in its environment, on any device."""
    environment = {
        # For POST /reset_prefix_cache.
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        # A namespace has no default route, by which vLLM would guess the host's address.
        "VLLM_HOST_IP": "127.0.0.1",
        # The KV has to take the link: no shared memory.
        "UCX_TLS": "tcp,self",
        "UCX_NET_DEVICES": site.kv_device,
        "UCX_WARN_UNUSED_ENV_VARS": "n",
        "NO_PROXY": "*",
    }
    if Path(model).is_dir():
        environment["HF_HUB_OFFLINE"] = "1"
    return environment


def forget_prefixes(server: ServerProcess, timeout: float = 30) -> None:
    """Make a server forget cached prefixes.

    Raises:
        ServerError: blocks were still in use after `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while True:
        reply = httpx.post(f"{server.url}/reset_prefix_cache", timeout=timeout, trust_env=False)
        if reply.status_code == 200 and reply.json().get("success"):
            return
        if time.monotonic() > deadline:
            raise ServerError(
                f"{server.name} holds KV blocks {timeout:.0f} s after its last request"
            )
        time.sleep(0.2)


def free_port() -> int:
    """A TCP port that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def cores_of(role: Role) -> str:
    """Half of the cores that this process may use, as VLLM_CPU_OMP_THREADS_BIND wants them.

    Two servers on the same cores stall each other's OpenMP barriers for seconds.
    """
    cores = sorted(os.sched_getaffinity(0))
    half = max(len(cores) // 2, 1)
    mine = cores[:half] if role is Role.PREFILL else cores[-half:]
    return ",".join(str(core) for core in mine)


def _gpu_count() -> int:
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
