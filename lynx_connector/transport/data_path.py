# SPDX-License-Identifier: Apache-2.0
"""Payloads over UCX, between endpoints that are made from worker addresses.

Receives match by tag alone, on the whole worker, so that each connection has a random tag of its
own. The consumer opens the way to the producer, which answers on it: only the producer's ports
have to be reachable.
"""

import asyncio
import contextlib
import secrets
from typing import Any

import numpy as np

CLOSE_NANOSECONDS = 2 * 10**9
_TOKEN_BYTES = 16
_LOOK_SECONDS = 0.002
_LAZY_SECONDS = 0.05


def worker_address() -> bytes:
    """Where this process's UCX worker is reached."""
    import ucxx

    return bytes(memoryview(ucxx.get_worker_address()))


def new_tag() -> bytes:
    """A tag that nobody else has or guesses."""
    return secrets.token_bytes(8)


async def heard(tag: bytes) -> None:
    """Wait for the one message that a peer sends to `tag` when it has reached this worker.

    Looks now and then: a receive that was posted for a message that never comes could not be
    cancelled.
    """
    from ucxx.core import _get_ctx

    worker, ucx_tag = _get_ctx().worker, _tag(tag)
    wait = _LOOK_SECONDS
    while not (found := worker.tag_probe(ucx_tag, remove=True)).matched:
        await asyncio.sleep(wait)
        wait = min(wait * 1.5, _LAZY_SECONDS)
    await worker.tag_recv_with_handle(_array(np.empty(found.length, np.uint8)), found).wait()


class DataPath:
    """One peer's UCX worker: what is sent goes to it, what is received carries `receive_tag`."""

    def __init__(self, endpoint: Any, send_tag: bytes, receive_tag: bytes):
        self._endpoint = endpoint
        self._send_tag = _tag(send_tag)
        self._receive_tag = _tag(receive_tag)

    @classmethod
    async def to(cls, address: bytes, send_tag: bytes, receive_tag: bytes) -> "DataPath":
        """A path to the worker at `address`; UCX connects when something is sent.

        Raises:
            ConnectionError: UCX cannot use this address.
        """
        import ucxx

        # UCX 1.21 aborts the process on an address of a version that it does not know, and raises
        # on all else that is malformed (address.c, ucp_address_unpack: the first byte's low half).
        if not address or (address[0] ^ worker_address()[0]) & 0x0F:
            raise ConnectionError("the peer's UCX worker address is malformed, or of another UCX")
        try:
            found = ucxx.get_ucx_address_from_buffer(address)
            endpoint = await ucxx.create_endpoint_from_worker_address(found)
        except Exception as error:
            raise ConnectionError(
                f"UCX has no transport in common with the peer ({error}): compare `lynx doctor` "
                "on both sides"
            ) from None
        return cls(endpoint, send_tag, receive_tag)

    async def knock(self) -> None:
        """Send the message for which the other side waits in `heard`, or `answer`.

        Raises:
            Exception: whatever UCX raised.
        """
        await self.send(np.zeros(_TOKEN_BYTES, np.uint8))

    async def answer(self) -> None:
        """Receive a `knock`."""
        await self.receive(np.empty(_TOKEN_BYTES, np.uint8))

    async def send(self, payload: np.ndarray) -> None:
        """Send bytes; returns when UCX has taken (or delivered) them.

        Sends are in order of call: the message is posted before the first suspension.
        """
        await self._endpoint.send(payload, tag=self._send_tag, force_tag=True)

    async def receive(self, buffer: np.ndarray) -> None:
        """Receive straight into `buffer` (uint8); a shorter message leaves its end as it was."""
        await self._endpoint.recv(buffer, tag=self._receive_tag, force_tag=True)

    @property
    def alive(self) -> bool:
        """Whether UCX still believes in the peer."""
        return not self._endpoint.closed

    async def close(self) -> None:
        """Close the endpoint; what is under way ends with an error on this side."""
        with contextlib.suppress(Exception):  # UCX reports a peer that closed first as an error
            await self._endpoint.close(period=CLOSE_NANOSECONDS)


def _tag(tag: bytes) -> Any:
    from ucxx.types import Tag

    return Tag(int.from_bytes(tag, "little"))


def _array(buffer: np.ndarray) -> Any:
    from ucxx._lib.arr import Array

    return Array(buffer)
