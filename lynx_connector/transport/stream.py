# SPDX-License-Identifier: Apache-2.0
"""Control messages over the socket on which two workers met."""

import asyncio
import os
import socket
from typing import TypeVar

from lynx_connector.errors import ProtocolError
from lynx_connector.transport.seal import OVERHEAD_BYTES, Seals
from lynx_connector.wire import messages

M = TypeVar("M", bound=messages.Message)

UNSENT_BYTES = 1 << 20
"""Control messages that wait for a peer that does not read: more of them end its connection."""

READ_AHEAD_BYTES = 16 << 10
"""asyncio buffers at most twice as much of what a peer sends unasked."""

CLOSE_SECONDS = 2.0
"""How long a peer has to read the last words."""

_KEEPALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 30_000}
"""A host that is gone without a word is noticed after half a minute."""


class MessageStream:
    """Messages in both directions, in order. All methods run in the transport loop."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, peer: str):
        self._reader = reader
        self._writer = writer
        self.peer = peer
        """How logs and causes call the other side."""
        self._limit = messages.GREETING_BYTES
        self.seals: Seals | None = None
        """What messages are sealed with, once both sides have proved a secret."""
        _tune(writer.get_extra_info("socket"))

    def trust(self) -> None:
        """The peer has proved who it is: its messages may be larger than a greeting."""
        self._limit = messages.MESSAGE_BYTES + OVERHEAD_BYTES

    def seal(self, seals: Seals) -> None:
        """Seal all further messages, and expect sealed ones."""
        self.seals = seals

    def write(self, message: messages.Message) -> None:
        """Queue one message; that the peer is gone is for `read` to find out.

        Raises:
            ConnectionError: the peer has not read for long.
            ProtocolError: the message is too long.
        """
        body = messages.encode(message)
        if self._writer.transport.get_write_buffer_size() > UNSENT_BYTES:
            self.abort()
            raise ConnectionError(f"connection to {self.peer} lost: it does not read")
        if self.seals is not None:
            body = self.seals.out.seal_message(body)
        self._writer.write(messages.prefix(len(body)) + body)

    async def drain(self) -> None:
        """Wait until the peer has read most of what was written.

        Raises:
            ConnectionError: the peer is gone.
        """
        try:
            await self._writer.drain()
        except OSError as error:
            raise self._lost(error) from None

    async def read(self) -> messages.AnyMessage:
        """The next message.

        Raises:
            ConnectionError: the peer is gone.
            ProtocolError: it sent something else; BrokenSealError: or somebody between did.
        """
        try:
            prefix = await self._reader.readexactly(messages.PREFIX.size)
            body = await self._reader.readexactly(messages.length_of(prefix, self._limit))
        except asyncio.IncompleteReadError as error:
            how = "in the middle of a message" if error.partial else "by the peer"
            raise ConnectionError(f"connection to {self.peer} closed {how}") from None
        except OSError as error:
            raise self._lost(error) from None
        if self.seals is not None:
            body = self.seals.into.open_message(body)
        return messages.decode(body)

    def _lost(self, error: OSError) -> ConnectionError:
        reason = os.strerror(error.errno) if error.errno else str(error) or "closed"
        return ConnectionError(f"connection to {self.peer} lost: {reason}")

    def close(self) -> None:
        """Close once what was written is sent."""
        self._writer.close()
        asyncio.get_running_loop().call_later(CLOSE_SECONDS, self.abort)

    def abort(self) -> None:
        """Close now."""
        self._writer.transport.abort()


async def expect(stream: MessageStream, kind: type[M]) -> M:
    """The next message, which has to be of that kind.

    Raises:
        ProtocolError: it is another one, or a refusal, whose cause is given.
        ConnectionError: as for `MessageStream.read`.
    """
    message = await stream.read()
    if isinstance(message, messages.Refused):
        raise ProtocolError(f"peer refused: {message.cause}")
    if not isinstance(message, kind):
        raise ProtocolError(f"expected {kind.__name__}, got {type(message).__name__}")
    return message


def _tune(sock: socket.socket) -> None:
    """Headers leave at once; the kernel finds out that a silent peer is gone."""
    # asyncio sets TCP_NODELAY itself, but not on what was accepted from a socket of protocol 0.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if (option := getattr(socket, name, None)) is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
