# SPDX-License-Identifier: Apache-2.0
"""Messages and payloads between two workers that have met."""

import asyncio
from collections import deque
from typing import Any

import numpy as np
import xxhash

from lynx_connector.errors import LynxError, ProtocolError
from lynx_connector.transport.data_path import DataPath
from lynx_connector.transport.seal import OVERHEAD_BYTES
from lynx_connector.transport.stream import MessageStream
from lynx_connector.wire import messages

QUEUED_MESSAGES = 64
LAST_PAYLOAD_SECONDS = 1.0
"""How long what a peer sent before it closed may still be on its way."""


def checksum(payload: Any) -> int:
    """xxh3-64 of a payload."""
    return xxhash.xxh3_64_intdigest(payload)


class Connection:
    """Ordered control messages, each `Frame` and `Tables` with its payload.

    Messages go over the socket, payloads over UCX, in the order of their headers. With a secret
    messages are sealed, and payloads where one side wants it. The socket alone says whether the
    peer lives; when it ends, so does what UCX has under way. `Taken` says that a payload is there:
    UCX itself calls one sent as soon as the kernel has it.
    """

    def __init__(self, stream: MessageStream, path: DataPath):
        self._stream = stream
        self._path = path
        self._queue: asyncio.Queue[messages.AnyMessage | Exception] = asyncio.Queue(QUEUED_MESSAGES)
        self._untaken: deque[asyncio.Future[None]] = deque()
        """Payloads that were announced and that the peer does not have, the oldest first."""
        self._ended = asyncio.Event()
        self._closed = False
        self._pumping = asyncio.ensure_future(self._pump())

    @property
    def peer(self) -> str:
        """How logs and causes call the other side."""
        return self._stream.peer

    async def _pump(self) -> None:
        """Read ahead, so that the peer's end is noticed while a payload is awaited."""
        try:
            while True:
                message = await self._stream.read()
                if isinstance(message, messages.Taken):
                    self._taken()
                else:
                    await self._queue.put(message)
        except (LynxError, ConnectionError) as error:
            self._ended.set()
            self._give_up_untaken()
            await self._queue.put(error)

    def _taken(self) -> None:
        if not self._untaken:
            raise ProtocolError("peer has taken a payload that was not sent")
        taken = self._untaken.popleft()
        if not taken.done():
            taken.set_result(None)

    def _give_up_untaken(self) -> None:
        for taken in self._untaken:
            taken.cancel()

    async def send(self, message: messages.Message, payload: np.ndarray | None = None) -> None:
        """Send one message; returns when the peer has its payload, or the kernel the message.

        Raises:
            ConnectionError: if the peer is gone.
        """
        if self._closed:
            raise ConnectionError(f"connection to {self.peer} closed")
        self._stream.write(message)
        if payload is None:
            await self._stream.drain()
            return
        taken = asyncio.get_running_loop().create_future()
        self._untaken.append(taken)
        # Nothing suspends between a header and the posting of its payload.
        seals = self._stream.seals
        if seals is not None and seals.payloads:
            payload = seals.out.seal_payload(messages.encode(message), payload)
        try:
            await self._path.send(payload)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            self._stream.abort()  # a header without payload: this connection is out of step
            raise ConnectionError(f"connection to {self.peer} lost: {error}") from None
        await asyncio.wait({taken})
        if taken.cancelled():
            raise ConnectionError(f"connection to {self.peer} lost")

    def post(self, message: messages.Message) -> None:
        """Send without waiting; that the peer is gone is for the reader to find out."""
        send = asyncio.ensure_future(self.send(message))
        send.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def receive(self) -> messages.AnyMessage:
        """The next control message.

        Raises:
            ConnectionError: if the peer is gone.
            ProtocolError: if it is not a valid message.
        """
        message = await self._queue.get()
        if isinstance(message, Exception):
            raise message
        return message

    async def receive_payload(self, header: messages.Payload, buffer: np.ndarray) -> None:
        """Receive the payload announced by `header` straight into `buffer` (uint8, exact size).

        Raises:
            ConnectionError: if the peer is gone.
            BrokenSealError: it is not what the peer sent; `buffer` is all zeros then.
        """
        if buffer.nbytes != header.num_bytes:
            raise ProtocolError(
                f"{type(header).__name__} announces {header.num_bytes} bytes for a buffer of "
                f"{buffer.nbytes}"
            )
        seals = self._stream.seals
        if seals is None or not seals.payloads:
            await self._receive(buffer)
            self._stream.write(messages.Taken())
            return
        sealed = np.empty(buffer.nbytes + OVERHEAD_BYTES, np.uint8)
        await self._receive(sealed)
        self._stream.write(messages.Taken())
        seals.into.open_payload(messages.encode(header), sealed, buffer)

    async def _receive(self, buffer: np.ndarray) -> None:
        receiving = asyncio.ensure_future(self._path.receive(buffer))
        ended = asyncio.ensure_future(self._ended.wait())
        try:
            await asyncio.wait({receiving, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not receiving.done():
                await asyncio.wait({receiving}, timeout=LAST_PAYLOAD_SECONDS)
        finally:
            ended.cancel()
            if not receiving.done():
                await self._path.close()  # UCX lets go of the buffer
                receiving.cancel()
        if receiving.cancelled():
            raise ConnectionError(f"connection to {self.peer} lost")
        if error := receiving.exception():
            raise ConnectionError(f"connection to {self.peer} lost: {error}")

    @property
    def alive(self) -> bool:
        """Whether the peer is still there."""
        return not self._closed and not self._ended.is_set() and self._path.alive

    async def close(self) -> None:
        """Close socket and endpoint; what is under way ends with an error on both sides."""
        self._closed = True
        self._pumping.cancel()
        self._give_up_untaken()
        self._stream.close()
        await self._path.close()
