# SPDX-License-Identifier: Apache-2.0
"""The `vllm serve` command of either role: what `lynx serve` runs and the demo starts.

vLLM is not imported: a command line must be quick to make.
"""

import importlib.metadata
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml

MIDDLEWARE = "lynx_connector.middleware.LynxMiddleware"
"""Tells HTTP clients why a transfer failed; vLLM keeps all that are given."""


class Role(StrEnum):
    """What an instance does with a request's KV cache."""

    PREFILL = "prefill"
    DECODE = "decode"

    @property
    def kv_role(self) -> str:
        """vLLM's word for it."""
        return "kv_producer" if self is Role.PREFILL else "kv_consumer"


def is_cpu_build() -> bool:
    """True where the installed vLLM is the CPU build: vLLM tells by its version, so do we."""
    try:
        return "cpu" in importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return False


def console_script(name: str) -> str:
    """Path of a console script, that of this Python's environment before any other.

    Raises:
        FileNotFoundError: there is none; the message says what to install.
    """
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        package = "lynx-connector[demo]" if name == "vllm-router" else "vLLM"
        raise FileNotFoundError(f"no command {name!r} beside {sys.executable}: install {package}")
    return found


def kv_transfer_config(role: Role, extra: Mapping[str, Any]) -> str:
    """`--kv-transfer-config` as JSON, with `extra` as `kv_connector_extra_config`."""
    config: dict[str, Any] = {"kv_connector": "LynxConnector", "kv_role": role.kv_role}
    if extra:
        config["kv_connector_extra_config"] = dict(extra)
    return json.dumps(config)


def serve_command(role: Role, model: str, vllm_args: Sequence[str], *, cpu: bool) -> list[str]:
    """`vllm serve MODEL` with the flags that `role` needs; flags in `vllm_args` win.

    Keys of a `--config` file in `vllm_args` count as given, too.

    Raises:
        FileNotFoundError: vLLM is not installed, or the `--config` file is not there.
    """
    given = set(_given_flags(vllm_args))
    command = [console_script("vllm"), "serve", model]
    if "--kv-transfer-config" not in given:
        # The dotted form, since vLLM merges it with dotted flags of the user.
        for key, value in (("kv_connector", "LynxConnector"), ("kv_role", role.kv_role)):
            flag = f"--kv-transfer-config.{key}"
            if flag not in given:
                command += [flag, value]
    if "--scheduler-cls" not in given:
        command += ["--scheduler-cls", _scheduler(vllm_args, given, cpu)]
    if MIDDLEWARE not in " ".join([*vllm_args, *map(str, _configured(vllm_args).values())]):
        command += ["--middleware", MIDDLEWARE]
    return [*command, *vllm_args]


def _scheduler(vllm_args: Sequence[str], given: set[str], cpu: bool) -> str:
    """The scheduler that fits how vLLM will schedule: see VllmConfig.__post_init__ of vLLM."""
    backend = _value(vllm_args, "--distributed-executor-backend")
    synchronous = cpu or "--no-async-scheduling" in given or backend == "ray"
    name = "LynxScheduler" if synchronous else "LynxAsyncScheduler"
    return f"lynx_connector.scheduler.{name}"


def _given_flags(vllm_args: Sequence[str]) -> Iterator[str]:
    """Flags as vLLM spells them: dashes for underscores up to the first dot."""
    for argument in vllm_args:
        if argument.startswith("--"):
            head, dot, rest = argument.partition("=")[0].partition(".")
            yield head.replace("_", "-") + dot + rest
    for key, value in _configured(vllm_args).items():
        name = key.replace("_", "-")
        yield f"--no-{name}" if value is False else f"--{name}"


def _configured(vllm_args: Sequence[str]) -> dict[str, Any]:
    """What the `--config` file says."""
    config = _value(vllm_args, "--config")
    return {} if config is None else yaml.safe_load(Path(config).read_text()) or {}


def _value(vllm_args: Sequence[str], flag: str) -> str | None:
    """The last value given to `flag`, as `--flag value` or `--flag=value`."""
    found = None
    for index, argument in enumerate(vllm_args):
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") == flag:
            found = value if equals else "".join(vllm_args[index + 1 : index + 2])
    return found
