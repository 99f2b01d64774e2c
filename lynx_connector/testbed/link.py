# SPDX-License-Identifier: Apache-2.0
"""A link of limited rate between two servers on one machine.

As root: two network namespaces, one for each server, joined by a veth pair whose two ends are
shaped by tc's token bucket filter. Each namespace has a second, unshaped veth to the host, over
which the router speaks HTTP to the servers, as over the management network of a real cluster.
Elsewhere: loopback, with the rate limit left to the sending connector (`link_mbit`).
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_KV_ADDRESSES = ("10.99.0.1", "10.99.0.2")
_NEEDED_CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21}
_NAME = re.compile(r"lynx-(\d+)-[pd]")


class LinkError(RuntimeError):
    """The namespaces could not be made; the message is that of the command that failed."""


@dataclass(frozen=True)
class Site:
    """Where one server runs, and how it is reached."""

    prefix: tuple[str, ...]
    """Command to put before the server's own."""
    http_host: str
    kv_host: str
    kv_device: str
    """Network interface of the KV transfer, for UCX_NET_DEVICES."""


@dataclass(frozen=True)
class Link:
    """Two sites and what joins them."""

    kind: str
    """`netns` or `loopback`."""
    mbit: float
    """Rate of the link in Mbit/s, 0 where unlimited."""
    sender_mbit: float
    """Rate that the sending connector has to keep by itself; 0 where the link does it."""
    prefill: Site
    decode: Site
    note: str
    """One line for people: what this is, and why it is not the other kind."""


def netns_obstacle() -> str | None:
    """Why this process cannot make network namespaces; None where it should be able to."""
    if os.geteuid() != 0:
        return "not root"
    held = _capabilities()
    lacking = [name for name, bit in _NEEDED_CAPABILITIES.items() if not held >> bit & 1]
    if lacking:  # root in a container
        return f"no {' and '.join(lacking)}"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    return f"no {' and '.join(missing)} (Debian: apt install iproute2)" if missing else None


def _capabilities() -> int:
    """This process's effective capabilities, a bit each; all of them where nothing says."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return -1
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.M)
    return int(found[1], 16) if found else -1


@contextlib.contextmanager
def open_link(mbit: float) -> Iterator[Link]:
    """A link of `mbit` Mbit/s (0: no limit), removed on the way out, whatever happens."""
    obstacle = netns_obstacle()
    if obstacle is None:
        _remove_leftovers()
        namespaces = _Namespaces(os.getpid())
        try:
            try:
                link = namespaces.build(mbit)
            except LinkError as error:
                obstacle = str(error)
            else:
                yield link
                return
        finally:
            namespaces.remove()
    yield loopback(mbit, obstacle)


def set_rate(link: Link, mbit: float) -> None:
    """Shape both directions of a `netns` link to `mbit` Mbit/s from now on (0: no limit).

    Raises:
        LinkError: tc refused.
    """
    for site in (link.prefill, link.decode):
        device = site.kv_device
        _run(*site.prefix, "tc", "qdisc", "delete", "dev", device, "root", check=False)
        if mbit:
            _run(*site.prefix, *_shaper(device, mbit))


def carried_bytes(link: Link) -> int:
    """Bytes that have crossed a `netns` link so far, in both directions, headers included.

    Raises:
        LinkError: the link is gone.
    """
    device = link.prefill.kv_device
    shown = _run(*link.prefill.prefix, "ip", "-json", "-statistics", "link", "show", "dev", device)
    counters = json.loads(shown)[0]["stats64"]
    return int(counters["rx"]["bytes"] + counters["tx"]["bytes"])


def loopback(mbit: float, why: str = "asked for") -> Link:
    """Both servers on 127.0.0.1, the sender keeping the rate."""
    site = Site((), "127.0.0.1", "127.0.0.1", "lo")
    rate = f"{mbit:g} Mbit/s kept by the sender" if mbit else "no rate limit"
    return Link("loopback", mbit, mbit, site, site, f"loopback, {rate} (no namespaces: {why})")


class _Namespaces:
    """The namespaces of one process; names carry its id, so that two demos do not collide."""

    def __init__(self, pid: int):
        self._names = (f"lynx-{pid}-p", f"lynx-{pid}-d")
        # Interface names have at most 15 characters.
        self._kv = (f"lx{pid}kp", f"lx{pid}kd")
        self._host_side = (f"lx{pid}hp", f"lx{pid}hd")
        self._management = (f"lx{pid}mp", f"lx{pid}md")
        self._pid = pid

    def build(self, mbit: float) -> Link:
        """Make namespaces, veths and shapers. What exists already when it fails, remove() takes."""
        for name in self._names:
            _run("ip", "netns", "add", name)
            _run("ip", "-n", name, "link", "set", "lo", "up")
        _run("ip", "link", "add", self._kv[0], "type", "veth", "peer", "name", self._kv[1])
        sites = []
        for side, network in enumerate(_free_networks(self._pid)):
            name, device = self._names[side], self._kv[side]
            _run("ip", "link", "set", device, "netns", name)
            _run("ip", "-n", name, "addr", "add", f"{_KV_ADDRESSES[side]}/24", "dev", device)
            _run("ip", "-n", name, "link", "set", device, "up")
            if mbit:
                _run("ip", "netns", "exec", name, *_shaper(device, mbit))
            host, inside = self._host_side[side], self._management[side]
            host_address, address = network.hosts()
            _run("ip", "link", "add", host, "type", "veth", "peer", "name", inside)
            _run("ip", "link", "set", inside, "netns", name)
            _run("ip", "addr", "add", f"{host_address}/30", "dev", host)
            _run("ip", "link", "set", host, "up")
            _run("ip", "-n", name, "addr", "add", f"{address}/30", "dev", inside)
            _run("ip", "-n", name, "link", "set", inside, "up")
            prefix = ("ip", "netns", "exec", name)
            sites.append(Site(prefix, str(address), _KV_ADDRESSES[side], device))
        rate = f"shaped to {mbit:g} Mbit/s by tc" if mbit else "unshaped"
        return Link("netns", mbit, 0, sites[0], sites[1], f"veth between two namespaces, {rate}")

    def remove(self) -> None:
        """Remove whatever of it exists."""
        # Not left to the namespaces' end: a namespace lives on while a process is in it.
        for device in (*self._host_side, *self._kv):
            _run("ip", "link", "delete", device, check=False)
        for name in self._names:
            _run("ip", "netns", "delete", name, check=False)


def _shaper(device: str, mbit: float) -> list[str]:
    # A burst of 10 ms: a bigger one would carry a part of the anchor for free.
    burst = max(int(mbit * 1e6 / 8 * 0.010), 128 << 10)
    command = ["tc", "qdisc", "replace", "dev", device, "root", "tbf", "rate", f"{mbit:g}mbit"]
    return [*command, "burst", str(burst), "latency", "50ms"]


def _free_networks(pid: int) -> list[ipaddress.IPv4Network]:
    """Two /30 networks that no interface of the host uses."""
    shown = json.loads(_run("ip", "-json", "addr", "show"))
    used = [
        ipaddress.IPv4Network(f"{address['local']}/{address['prefixlen']}", strict=False)
        for interface in shown
        for address in interface.get("addr_info", ())
        if address["family"] == "inet"
    ]
    # From a place that depends on the process, so that two demos started at once differ.
    candidates = list(ipaddress.IPv4Network("10.98.0.0/16").subnets(new_prefix=30))
    start = pid * 2 % len(candidates)
    free = [
        network
        for network in candidates[start:] + candidates[:start]
        if not any(network.overlaps(other) for other in used)
    ][:2]
    if len(free) < 2:
        raise LinkError("10.98.0.0/16 is in use on this host")
    return free


def _remove_leftovers() -> None:
    """Remove what processes that no longer exist left behind (killed by SIGKILL)."""
    for line in _run("ip", "netns", "list", check=False).splitlines():
        name = _NAME.match(line)
        if name and not Path(f"/proc/{name[1]}").exists():
            _Namespaces(int(name[1])).remove()


def _run(*command: str, check: bool = True) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise LinkError(f"`{' '.join(command)}`: {done.stderr.strip() or done.returncode}")
    return done.stdout
