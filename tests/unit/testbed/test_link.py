# SPDX-License-Identifier: Apache-2.0
"""The shaped link: its rate, and that nothing of it stays."""

import os
import subprocess
import sys
import time

import pytest

from lynx_connector.testbed import link as link_module
from lynx_connector.testbed.link import (
    Link,
    LinkError,
    carried_bytes,
    loopback,
    netns_obstacle,
    open_link,
    set_rate,
)

OBSTACLE = netns_obstacle()


def needs_root(test):
    """Marks a test that makes network namespaces."""
    skip = pytest.mark.skipif(OBSTACLE is not None, reason=f"no namespaces here: {OBSTACLE}")
    return pytest.mark.root(skip(test))


SENDER = """
import socket, sys
with socket.create_server((sys.argv[1], 5001)) as server:
    print("listening", flush=True)
    connection, _ = server.accept()
    with connection:
        connection.sendall(bytes(int(sys.argv[2])))
"""
RECEIVER = """
import socket, sys
with socket.create_connection((sys.argv[1], 5001)) as connection:
    while connection.recv(1 << 20):
        pass
"""


def my_leftovers() -> list[str]:
    """Namespaces and interfaces of this process."""
    shown = [
        subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for command in (["ip", "netns", "list"], ["ip", "-brief", "link"])
    ]
    mine = (f"lynx-{os.getpid()}-", f"lx{os.getpid()}")
    return [line for text in shown for line in text.splitlines() if line.startswith(mine)]


def seconds_to_send(link: Link, size: int) -> float:
    """How long `size` bytes take from the prefill's site to the decode's."""
    command = [*link.prefill.prefix, sys.executable, "-c", SENDER, link.prefill.kv_host]
    with subprocess.Popen([*command, str(size)], stdout=subprocess.PIPE, text=True) as sender:
        assert sender.stdout.readline() == "listening\n"
        receiver = [*link.decode.prefix, sys.executable, "-c", RECEIVER, link.prefill.kv_host]
        started = time.monotonic()
        subprocess.run(receiver, check=True)
        return time.monotonic() - started


@needs_root
def test_the_link_keeps_its_rate():
    size = 5_000_000
    with open_link(100) as link:
        assert (link.kind, link.sender_mbit) == ("netns", 0)
        seconds = seconds_to_send(link, size)
    # Never faster than the link but for its burst, and not so slow that it would not be the link.
    assert 0.9 * size * 8 / 100e6 < seconds < 5 * size * 8 / 100e6
    assert my_leftovers() == []


@needs_root
def test_the_rate_changes_while_the_link_is_open_and_its_bytes_are_counted():
    size = 3_000_000
    with open_link(0) as link:
        before = carried_bytes(link)
        set_rate(link, 20)
        assert seconds_to_send(link, size) > 0.9 * size * 8 / 20e6
        assert size < carried_bytes(link) - before < 1.2 * size
        set_rate(link, 0)
        assert seconds_to_send(link, size) < 0.5 * size * 8 / 20e6


@needs_root
def test_the_link_is_removed_when_its_user_fails():
    with pytest.raises(KeyboardInterrupt), open_link(10):
        assert len(my_leftovers()) >= 4
        raise KeyboardInterrupt
    assert my_leftovers() == []


@needs_root
def test_a_link_that_cannot_be_made_falls_back_and_leaves_nothing(monkeypatch):
    real = link_module._run

    def refuse_shaping(*command, check=True):
        if "tc" in command:
            raise LinkError("no tbf in this kernel")
        return real(*command, check=check)

    monkeypatch.setattr(link_module, "_run", refuse_shaping)
    with open_link(100) as link:
        assert link.kind == "loopback"
        assert "no tbf" in link.note
        assert my_leftovers() == []


def test_without_root_the_sender_keeps_the_rate(monkeypatch):
    monkeypatch.setattr(link_module.os, "geteuid", lambda: 1000)
    with open_link(200) as link:
        assert (link.kind, link.mbit, link.sender_mbit) == ("loopback", 200, 200)
        assert "not root" in link.note


def test_a_missing_tool_is_named(monkeypatch):
    monkeypatch.setattr(link_module.os, "geteuid", lambda: 0)
    monkeypatch.setattr(link_module, "_capabilities", lambda: -1)
    monkeypatch.setattr(link_module.shutil, "which", lambda tool: None if tool == "tc" else tool)
    assert "no tc" in netns_obstacle()
    assert "iproute2" in netns_obstacle()


@pytest.mark.parametrize(
    ("held", "lacking"),
    [
        ("00000000a80425fb", "no CAP_NET_ADMIN and CAP_SYS_ADMIN"),  # a container's default
        ("00000000a80435fb", "no CAP_SYS_ADMIN"),
    ],
    ids=["default", "net-admin"],
)
def test_root_in_a_container_lacks_capabilities(monkeypatch, held, lacking):
    status = f"Uid:\t0\nCapPrm:\tffffffffffffffff\nCapEff:\t{held}\n"
    monkeypatch.setattr(link_module.os, "geteuid", lambda: 0)
    monkeypatch.setattr(link_module.Path, "read_text", lambda self: status)
    assert netns_obstacle() == lacking


def test_loopback_without_limit():
    link = loopback(0)
    assert link.sender_mbit == 0
    assert "no rate limit" in link.note
