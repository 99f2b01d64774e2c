# SPDX-License-Identifier: Apache-2.0
"""Hosts that peers and clients name: their addresses, found without holding up anybody else."""

import asyncio
import ipaddress
import os
import socket
import threading

from lynx_connector.errors import TransferError

RESOLVE_SECONDS = 5.0
MAX_LOOKUPS = 64
"""Names that may be looked up at once: a dead resolver holds a thread for each."""


def bare_host(host: str) -> str:
    """A host without the brackets that URLs put around IPv6 addresses."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def printable(host: str, port: int) -> str:
    """`host:port`, with brackets where the host has colons; control characters are escaped."""
    host = bare_host(host).encode("unicode_escape").decode("ascii")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def literal(host: str) -> str | None:
    """The host if it is an IP address, without brackets; None if it is a name."""
    host = bare_host(host)
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return None
    return host


class Resolver:
    """Looks up names in threads of its own, each name once at a time. Used in one loop."""

    def __init__(self) -> None:
        self._lookups: dict[str, asyncio.Future[list[str]]] = {}

    async def resolve(self, host: str) -> list[str]:
        """IP addresses of a host, in the resolver's order of preference.

        Raises:
            TransferError: the name is unknown, or was not found in time.
        """
        if (address := literal(host)) is not None:
            return [address]
        lookup = self._lookups.get(host) or self._look_up(host)
        try:
            async with asyncio.timeout(RESOLVE_SECONDS):
                return await asyncio.shield(lookup)
        except TimeoutError:
            cause = f"no answer of the resolver within {RESOLVE_SECONDS:g} s"
        except (OSError, UnicodeError) as error:  # a name of forbidden form, too
            cause = getattr(error, "strerror", None) or str(error)
        raise TransferError(f"cannot resolve host {host!r}: {cause}")

    def _look_up(self, host: str) -> "asyncio.Future[list[str]]":
        if len(self._lookups) >= MAX_LOOKUPS:
            raise TransferError(
                f"cannot resolve host {host!r}: {MAX_LOOKUPS} names are being looked up; is the "
                "resolver (/etc/resolv.conf) alive?"
            )
        loop = asyncio.get_running_loop()
        found = self._lookups[host] = loop.create_future()
        found.add_done_callback(lambda _: self._lookups.pop(host, None))

        def settle(addresses: list[str], error: Exception | None) -> None:
            if found.done():
                return
            if error is None:
                found.set_result(addresses)
            else:
                found.set_exception(error)
                found.exception()  # retrieved: nobody may be waiting any more

        def look() -> None:
            addresses: list[str] = []
            error: Exception | None = None
            try:
                rows = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
                addresses = list(dict.fromkeys(str(row[4][0]) for row in rows))
            except Exception as problem:
                error = problem
            if not loop.is_closed():
                loop.call_soon_threadsafe(settle, addresses, error)

        # A daemon: the C library may hold it long after anybody cares.
        threading.Thread(target=look, name="lynx-resolve", daemon=True).start()
        return found


async def open_socket(
    addresses: list[str], port: int, seconds: float, read_ahead: int
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to the first address that answers, within `seconds` for all of them.

    Raises:
        OSError, TimeoutError: of the last one.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    last: OSError = OSError("no address")
    for i, address in enumerate(addresses):
        share = (deadline - loop.time()) / (len(addresses) - i)
        try:
            async with asyncio.timeout(max(share, 0.1)):
                return await asyncio.open_connection(address, port, limit=read_ahead)
        except TimeoutError as error:
            last = error  # an OSError, too
        except OSError as error:
            last = OSError(error.errno, os.strerror(error.errno)) if error.errno else error
    raise last
