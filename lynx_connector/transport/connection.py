# SPDX-License-Identifier: Apache-2.0
"""Messages and payloads over one UCX endpoint."""

import asyncio
import contextlib
from typing import Any

import numpy as np
import xxhash

from lynx_connector.errors import ProtocolError
from lynx_connector.wire import messages

CLOSE_NANOSECONDS = 2 * 10**9


def checksum(payload: Any) -> int:
    """xxh3-64 of a payload."""
    return xxhash.xxh3_64_intdigest(payload)


class Connection:
    """Ordered control slots, each `Frame` and `Tables` followed by its payload.

    Sends are posted in call order: slot and payload become two adjacent tag messages, and UCX keeps
    messages of one tag between two peers in order.
    """

    def __init__(self, endpoint: Any, peer: str):
        self._endpoint = endpoint
        self.peer = peer
        self._slot = np.empty(messages.SLOT_BYTES, np.uint8)

    async def send(self, message: messages.Message, payload: np.ndarray | None = None) -> None:
        """Send one message; returns when UCX has taken (or delivered) the bytes.

        Raises:
            ConnectionError: if the peer is gone.
        """
        parts = (
            [messages.encode(message)]
            if payload is None
            else [
                messages.encode(message),
                payload,
            ]
        )
        # Tasks start in creation order, which fixes the order on the wire.
        posts = [asyncio.ensure_future(self._endpoint.send(part)) for part in parts]
        try:
            await asyncio.gather(*posts)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            raise ConnectionError(f"connection to {self.peer} lost: {error}") from None

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
        await self._receive_into(self._slot)
        return messages.decode(self._slot.data)

    async def receive_payload(self, header: messages.Payload, buffer: np.ndarray) -> None:
        """Receive the payload announced by `header` straight into `buffer` (uint8, exact size)."""
        if buffer.nbytes != header.num_bytes:
            raise ProtocolError(
                f"{type(header).__name__} announces {header.num_bytes} bytes for a buffer of "
                f"{buffer.nbytes}"
            )
        await self._receive_into(buffer)

    async def _receive_into(self, buffer: np.ndarray) -> None:
        try:
            await self._endpoint.recv(buffer)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            raise ConnectionError(f"connection to {self.peer} lost: {error}") from None

    @property
    def alive(self) -> bool:
        """Whether UCX still believes in the peer."""
        return not self._endpoint.closed

    async def close(self) -> None:
        """Close the endpoint; what is under way ends with an error on both sides."""
        with contextlib.suppress(Exception):  # UCX reports a peer that closed first as an error
            await self._endpoint.close(period=CLOSE_NANOSECONDS)
