# SPDX-License-Identifier: Apache-2.0
"""How a consumer's worker comes to a connection with a producer's.

All but the first three messages are sealed where there is a secret.

consumer                    producer
Hello            ->                        over the socket
                 <-         Welcome
Proof            ->
                 <-         Ready          where its UCX worker is
Join             ->                        where the consumer's is
knock            ->                        over UCX
                 <-         Joined         over the socket
                 <-         knock          over UCX
"""

import asyncio
import math

from lynx_connector.errors import LynxError, ProtocolError, TransferError
from lynx_connector.transport.address import Resolver, open_socket, printable
from lynx_connector.transport.connection import Connection
from lynx_connector.transport.data_path import DataPath, heard, new_tag, worker_address
from lynx_connector.transport.handshake import Identity, greet, welcome
from lynx_connector.transport.stream import READ_AHEAD_BYTES, MessageStream, expect
from lynx_connector.wire import messages

Address = tuple[str, int]

CONNECT_SECONDS = 10.0
GREETING_SECONDS = 10.0
"""How long two workers may take to prove who they are."""
JOIN_SECONDS = 10.0
"""How long UCX may take to connect them."""


class DeafPeerError(TransferError):
    """Nobody answered in time."""


async def meet(
    address: Address, identity: Identity, resolver: Resolver, patience: float = math.inf
) -> tuple[Connection, messages.Welcome, messages.Ready]:
    """The consumer's half; returns what the producer said of itself, too.

    patience: seconds that are waited for an answer at most, where that is less than usual.

    Raises:
        DeafPeerError: the address or its process does not answer.
        TransferError: naming the address and the cause.
    """
    host, port = address
    connect_seconds = min(patience, CONNECT_SECONDS)
    greeting_seconds = min(patience, GREETING_SECONDS)
    where = printable(host, port)
    try:
        addresses = await resolver.resolve(host)
        reader, writer = await open_socket(addresses, port, connect_seconds, READ_AHEAD_BYTES)
    except TimeoutError:
        raise DeafPeerError(
            f"cannot connect to {where}: no answer within {connect_seconds:g} s"
        ) from None
    except (OSError, TransferError) as error:
        raise TransferError(f"cannot connect to {where}: {error}") from None
    stream = MessageStream(reader, writer, where)
    try:
        async with asyncio.timeout(greeting_seconds):
            welcomed = await greet(stream, identity)
            ready = await expect(stream, messages.Ready)
        return await _join(stream, ready), welcomed, ready
    except TimeoutError:
        stream.abort()
        raise DeafPeerError(
            f"{where}: handshake timed out: no answer within {greeting_seconds:g} s"
        ) from None
    except (LynxError, ConnectionError) as error:
        stream.abort()
        raise TransferError(f"{where}: {error}") from None
    except BaseException:
        stream.abort()
        raise


async def _join(stream: MessageStream, ready: messages.Ready) -> Connection:
    join = messages.Join(worker_address(), new_tag())
    path = await DataPath.to(ready.address, ready.tag, join.tag)
    stream.write(join)
    knocking = asyncio.ensure_future(path.knock())
    knocking.add_done_callback(lambda done: done.cancelled() or done.exception())
    try:
        async with asyncio.timeout(JOIN_SECONDS):
            await expect(stream, messages.Joined)
            await path.answer()
    except TimeoutError:
        await path.close()
        raise TransferError(unreachable(ready.data_ports)) from None
    except BaseException:
        await path.close()
        raise
    return Connection(stream, path)


async def receive_guest(
    stream: MessageStream, identity: Identity, data_ports: str, tables: str
) -> tuple[Connection, messages.Hello]:
    """The producer's half; a peer that fails it is told why.

    data_ports, tables: see `Ready`.

    Raises:
        ProtocolError: also AuthenticationError.
        ConnectionError, TimeoutError: the peer is gone or silent.
    """
    try:
        async with asyncio.timeout(GREETING_SECONDS):
            hello = await welcome(stream, identity)
            ready = messages.Ready(worker_address(), new_tag(), data_ports, tables)
            stream.write(ready)
            join = await expect(stream, messages.Join)
        stream.peer = f"{hello.peer} ({stream.peer})"
        try:
            async with asyncio.timeout(JOIN_SECONDS):
                await _heard_or_gone(stream, ready.tag)
        except TimeoutError:
            raise ProtocolError(unreachable(data_ports)) from None
        path = await DataPath.to(join.address, join.tag, ready.tag)
    except (ProtocolError, ConnectionError) as error:
        if isinstance(error, ProtocolError):
            stream.write(messages.Refused(str(error)[: messages.MAX_CAUSE]))
        raise
    stream.write(messages.Joined())
    try:
        async with asyncio.timeout(JOIN_SECONDS):
            await path.knock()
    except BaseException as error:
        await path.close()
        if isinstance(error, asyncio.CancelledError | TimeoutError):
            raise
        raise ConnectionError(f"connection to {stream.peer} lost: {error}") from None
    return Connection(stream, path), hello


async def _heard_or_gone(stream: MessageStream, tag: bytes) -> None:
    """Wait for the peer's knock; a peer that goes before is not waited for."""
    knocked = asyncio.ensure_future(heard(tag))
    gone = asyncio.ensure_future(stream.read())  # it has nothing to say here
    try:
        await asyncio.wait({knocked, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not knocked.done():
            raise ProtocolError(f"unexpected {type(gone.result()).__name__}")
        knocked.result()
    finally:
        knocked.cancel()
        gone.cancel()
        await asyncio.wait({knocked, gone})
        gone.cancelled() or gone.exception()


def unreachable(data_ports: str) -> str:
    """The cause of a meeting whose second half failed."""
    ports = f"data_ports {data_ports}" if data_ports else "data_ports, which UCX chose"
    return (
        f"met, but UCX did not get through within {JOIN_SECONDS:g} s: open the prefill's {ports} "
        "in the firewall, and let UCX_TLS and UCX_NET_DEVICES agree on both sides"
    )
