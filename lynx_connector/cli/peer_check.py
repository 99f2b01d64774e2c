# SPDX-License-Identifier: Apache-2.0
"""`lynx doctor --peer`: whether a prefill can be reached from here, and which half of the way is
closed."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

from lynx_connector.cli.checks import Check, Status, good, last_line, run_python

_SECONDS = 40


def peer(address: str, secret_file: Path | None = None) -> Iterator[Check]:
    """A prefill's Lynx ports: TCP, Lynx's greeting, then UCX."""
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal():
        yield Check("peer", Status.BAD, f"{address!r} is not HOST:PORT", "e.g. 10.0.0.1:7600")
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        remedy = (
            "is the prefill running with this listen_port, and does a firewall let it through? "
            "Its log names the port"
        )
        yield Check("peer tcp", Status.BAD, f"{address}: {error}", remedy)
        return
    yield good("peer tcp", f"{address} accepts connections")
    arguments = [host, port, *([str(secret_file)] if secret_file else [])]
    done = run_python("-m", "lynx_connector.transport.probe", *arguments, timeout=_SECONDS)
    if done.returncode:
        yield Check("peer lynx", Status.BAD, last_line(done.stderr), _remedy(done.stderr))
        return
    met = json.loads(last_line(done.stdout))
    sealed = "with a shared secret" if met["secret"] else "without a shared secret"
    yield good("peer lynx", f"{met['peer']} (lynx-connector {met['release']}) greets {sealed}")
    ports = met["data_ports"] or "any that it chose"
    yield good("peer ucx", f"UCX reaches it and is reached from it (data_ports: {ports})")


def _remedy(text: str) -> str:
    if "shared secret" in text:
        return "name the prefill's secret_file with --secret-file"
    if "data_ports" in text:
        return "listen_port is open, the ports that carry the KV are not"
    return "is this a prefill's listen_port, with the same lynx-connector? Its log says more"
