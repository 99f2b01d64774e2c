# SPDX-License-Identifier: Apache-2.0
"""The producer's meeting point: a listening socket, and what keeps strangers cheap.

Before a peer has proved anything it costs one socket and a few KiB, for at most
`GREETING_SECONDS`; no more than `MAX_STRANGERS` of them are borne at a time.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from lynx_connector.errors import LynxError
from lynx_connector.transport.address import printable
from lynx_connector.transport.connection import Connection
from lynx_connector.transport.handshake import Identity
from lynx_connector.transport.meeting import receive_guest
from lynx_connector.transport.ports import listen
from lynx_connector.transport.stream import READ_AHEAD_BYTES, MessageStream
from lynx_connector.wire import messages

logger = logging.getLogger("vllm.lynx.server")

MAX_STRANGERS = 128
LOG_SECONDS = 10.0
"""At most one line in so long about connections that were refused."""

Serve = Callable[[Connection, messages.Hello], Awaitable[None]]


class Door:
    """Lets in who can prove that it belongs here. All methods run in the transport loop."""

    def __init__(
        self, identity: Identity, serve: Serve, announce: Callable[[], str], data_ports: str
    ):
        self.identity = identity
        self._serve = serve
        self._announce = announce
        self._data_ports = data_ports
        self._strangers: dict[MessageStream, None] = {}
        self._guests: set[asyncio.Task[None]] = set()
        self._refusals = _Refusals()
        self._servers: list[asyncio.Server] = []
        self.port = 0

    async def open(self, host: str, port: int) -> None:
        """Listen; see `ports.listen`."""
        sockets = await listen(host, port)
        self.port = sockets[0].getsockname()[1]
        for sock in sockets:
            server = await asyncio.start_server(self._accept, sock=sock, limit=READ_AHEAD_BYTES)
            self._servers.append(server)

    async def close(self) -> None:
        """Stop listening, and end all connections."""
        for server in self._servers:
            server.close()
        for task in self._guests:
            task.cancel()
        if self._guests:
            await asyncio.wait(self._guests, timeout=2.0)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._guests.add(task)
        task.add_done_callback(self._guests.discard)
        where = writer.get_extra_info("peername") or ("?", 0)
        try:
            stream = MessageStream(reader, writer, printable(_plain(where[0]), where[1]))
        except OSError:
            return  # gone before it was looked at
        if len(self._strangers) >= MAX_STRANGERS:
            # The oldest: who belongs here is through in milliseconds.
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            oldest.abort()
        self._strangers[stream] = None
        try:
            connection, hello = await receive_guest(
                stream, self.identity, self._data_ports, self._announce()
            )
        except (LynxError, OSError, TimeoutError) as error:
            self._refusals.log(stream.peer, str(error) or "handshake timed out")
            stream.close()
            return
        except BaseException:
            stream.abort()
            raise
        finally:
            self._strangers.pop(stream, None)
        try:
            await self._serve(connection, hello)
        finally:
            await connection.close()


class _Refusals:
    """Log lines about strangers, who may come by the thousand."""

    def __init__(self) -> None:
        self._next = 0.0
        self._silent = 0

    def log(self, peer: str, cause: str) -> None:
        now = time.monotonic()
        if now < self._next:
            self._silent += 1
            return
        more = f" ({self._silent} more since the last such line)" if self._silent else ""
        self._next, self._silent = now + LOG_SECONDS, 0
        logger.warning("lynx: refused a connection from %s: %s%s", peer, cause, more)


def _plain(host: str) -> str:
    """An IPv4 address as such, even where it came to a socket for both families."""
    return host.removeprefix("::ffff:")
