# SPDX-License-Identifier: Apache-2.0
"""The listening sockets of a meeting point."""

import asyncio
import errno
import logging
import socket

from lynx_connector.errors import TransferError
from lynx_connector.transport.address import bare_host, printable

logger = logging.getLogger("vllm.lynx.server")

PORT_SECONDS = 30.0
"""How long a port may be taken: by the process that this one replaces, if its end is slow."""

_LOOK_SECONDS = 0.2
_BACKLOG = 256


async def listen(host: str, port: int) -> list[socket.socket]:
    """Sockets that listen on one port (0: any free one) of a host; empty: of all interfaces.

    Raises:
        TransferError: the port stays taken, or the host is not this one's.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + PORT_SECONDS
    waiting = False
    while True:
        try:
            return _bind(bare_host(host), port)
        except OSError as error:
            where = printable(host or "*", port)
            if error.errno != errno.EADDRINUSE:
                raise TransferError(
                    f"cannot listen on {where}: {error.strerror}: listen_host must be a host name "
                    "or address of this host"
                ) from None
            if loop.time() > deadline:
                raise TransferError(
                    f"cannot listen on {where}: {error.strerror}; choose another port"
                ) from None
            if not waiting:
                waiting = True
                logger.warning("lynx: %s is taken; waiting up to %g s for it", where, PORT_SECONDS)
        await asyncio.sleep(_LOOK_SECONDS)


def _bind(host: str, port: int) -> list[socket.socket]:
    # create_server sets SO_REUSEADDR: connections of a process that has died hold no port.
    if not host:
        return [_everywhere(port)]
    opened: list[socket.socket] = []
    try:
        for family, address in _addresses(host):
            opened.append(socket.create_server((address, port), family=family, backlog=_BACKLOG))
            port = opened[0].getsockname()[1]
    except OSError:
        for sock in opened:
            sock.close()
        raise
    return opened


def _everywhere(port: int) -> socket.socket:
    """IPv4 and, where there is any, IPv6."""
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(
                ("", port), family=socket.AF_INET6, backlog=_BACKLOG, dualstack_ipv6=True
            )
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise
    return socket.create_server(("", port), backlog=_BACKLOG)


def _addresses(host: str) -> list[tuple[socket.AddressFamily, str]]:
    rows = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    found = {(family, str(where[0])) for family, _, _, _, where in rows}
    return sorted(found)  # the same order, and so the same port, at each start
