# SPDX-License-Identifier: Apache-2.0
"""What is compared: each mode is its servers' connector settings and what its requests carry."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lynx_connector.bench.errors import BenchError
from lynx_connector.testbed.launch import Role

LYNX, NIXL = "LynxConnector", "NixlConnector"
_BLOCKING = {"vllm_xargs": {"lynx_start": "blocking"}}
_PLAIN = {"early_reply": False, "first_token": False, "plan": "fixed"}
"""A plain transfer: the codec named, all of it after the prefill, no token before it."""

_LEASE = {"kv_lease_duration": 600}
"""Seconds. NIXL's 30 would free blocks that are still being read where a link is slow."""


@dataclass(frozen=True)
class ServerSpec:
    """One `vllm serve`. Modes whose specs are equal share the server."""

    role: Role
    transfer_config: str = ""
    """`--kv-transfer-config`; empty for a server that has no connector."""
    lynx: bool = False


@dataclass(frozen=True)
class Mode:
    """One way to serve a request."""

    name: str
    connector: str | None = None
    """None: one server does prefill and decode."""
    producer: Mapping[str, Any] = field(default_factory=dict)
    """`kv_connector_extra_config` of the prefill server."""
    consumer: Mapping[str, Any] = field(default_factory=dict)
    request: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the decode leg."""

    @property
    def is_lynx(self) -> bool:
        """Whether Lynx's connector serves it."""
        return self.connector == LYNX

    def specs(self, link_mbit: float = 0) -> tuple[ServerSpec, ...]:
        """(server,) or (prefill, decode); `link_mbit`: rate that the Lynx sender has to keep."""
        if self.connector is None:
            return (ServerSpec(Role.DECODE),)
        limit = {"link_mbit": link_mbit} if self.is_lynx and link_mbit else {}
        return (
            self._spec(Role.PREFILL, {**self.producer, **limit}),
            self._spec(Role.DECODE, self.consumer),
        )

    def _spec(self, role: Role, extra: Mapping[str, Any]) -> ServerSpec:
        config: dict[str, Any] = {"kv_connector": self.connector, "kv_role": role.kv_role}
        if self.connector == NIXL:
            config["kv_buffer_device"] = "cpu"
        if extra:
            config["kv_connector_extra_config"] = dict(extra)
        return ServerSpec(role, json.dumps(config, sort_keys=True), self.is_lynx)


MODES: dict[str, Mode] = {
    mode.name: mode
    for mode in (
        Mode("single"),
        Mode("nixl", NIXL, _LEASE, _LEASE),
        Mode("lynx", LYNX),
        Mode("lynx-int8", LYNX, {"codec": "int8", **_PLAIN}, request=_BLOCKING),
        Mode("lynx-bf16", LYNX, {"codec": "bf16", **_PLAIN}, request=_BLOCKING),
        Mode("lynx-int4", LYNX, {"codec": "int4", **_PLAIN}, request=_BLOCKING),
    )
}
"""All modes by name, in the order in which they are measured."""


def select_modes(names: Sequence[str]) -> list[Mode]:
    """The modes of these names, all where there are none. Raises BenchError for an unknown one."""
    for name in names:
        if name not in MODES:
            near = difflib.get_close_matches(name, MODES, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise BenchError(f"--mode {name}: {hint}known: {', '.join(MODES)}")
    return [mode for name, mode in MODES.items() if not names or name in names]


def server_specs(modes: Iterable[Mode], link_mbit: float = 0) -> list[ServerSpec]:
    """Every server that these modes need, once."""
    return list(dict.fromkeys(spec for mode in modes for spec in mode.specs(link_mbit)))


def split_by_memory(
    modes: Sequence[Mode], server_bytes: int, available_bytes: int
) -> list[list[Mode]]:
    """The modes in groups, in their order, whose servers fit into memory at the same time.

    Raises:
        BenchError: the servers of one mode alone do not fit.
    """
    groups: list[list[Mode]] = []
    for mode in modes:
        need = len(server_specs([mode])) * server_bytes
        if need > available_bytes:
            raise BenchError(
                f"mode {mode.name} needs about {need / 2**30:.1f} GiB of memory, "
                f"{available_bytes / 2**30:.1f} are available; choose shorter prompts, fewer "
                "requests at once, or a smaller model"
            )
        if groups and len(server_specs([*groups[-1], mode])) * server_bytes <= available_bytes:
            groups[-1].append(mode)
        else:
            groups.append([mode])
    return groups
