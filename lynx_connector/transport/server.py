# SPDX-License-Identifier: Apache-2.0
"""The producer's end: serves staged tiers to every consumer that passes the handshake."""

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import Callable
from typing import Protocol

import numpy as np

from lynx_connector import protocol
from lynx_connector.codec import KltTables
from lynx_connector.errors import ProtocolError, TransferError
from lynx_connector.events import EventLog
from lynx_connector.producer.outbound import TierStream
from lynx_connector.producer.staging import StagedTransfer, StagingStore
from lynx_connector.transport.connection import Connection, checksum
from lynx_connector.transport.handshake import Identity, welcome
from lynx_connector.transport.pacing import RateLimiter

logger = logging.getLogger("vllm.lynx.server")

FRAMES_IN_FLIGHT = 2

MAX_TABLES_QUEUED = 16


class TablesSource(Protocol):
    """Where the server finds learned tables."""

    @property
    def current(self) -> str:
        """Digest to announce to new consumers; empty: none."""

    def find(self, digest: str) -> KltTables | None:
        """Tables that a consumer asks for."""


class TierServer:
    """One listener; per connection one reader and one sender that sends in tier order."""

    def __init__(
        self,
        store: StagingStore,
        identity: Identity,
        events: EventLog,
        frame_bytes: int,
        link_mbit: float,
        tables: TablesSource | None = None,
    ):
        self._store = store
        self._tables = tables
        self._identity = identity
        self._events = events
        self._frame_bytes = frame_bytes
        self._limiter = RateLimiter(link_mbit)
        self._sessions: set[_Session] = set()
        self.port = 0

    async def start(self, port: int) -> None:
        """Listen on `port` (0: any free one) and expire leases.

        Raises:
            TransferError: if the port is taken.
        """
        import ucxx

        try:
            self._listener = ucxx.create_listener(self._serve, port=port)
        except Exception as error:
            raise TransferError(
                f"cannot listen on UCX port {port}: {error}; choose another listen_port"
            ) from None
        self.port = self._listener.port
        self._expiry = asyncio.ensure_future(self._expire_leases())

    async def _expire_leases(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            for session in self._sessions:
                session.renew_leases()
            for transfer in self._store.expire():
                logger.warning(
                    "lynx: lease of transfer %s (request %s) expired, %d bytes of staging freed",
                    transfer.transfer_id,
                    transfer.request_id,
                    transfer.num_bytes,
                )
                self.notify()

    async def _serve(self, endpoint: object) -> None:
        connection = Connection(endpoint, "consumer (before handshake)")
        try:
            announced = self._tables.current if self._tables else ""
            hello = await welcome(connection, self._identity, announced)
        except (ProtocolError, ConnectionError, TimeoutError) as error:
            logger.warning("lynx: refused a consumer: %s", error or "handshake timed out")
            await connection.close()
            return
        connection.peer = hello.peer
        session = _Session(self, connection)
        self._sessions.add(session)
        logger.info("lynx: consumer %s connected", connection.peer)
        try:
            await session.run()
        finally:
            self._sessions.discard(session)
            await connection.close()

    def notify(self) -> None:
        """New rows were encoded: wake the senders that wait for them."""
        for session in self._sessions:
            session.wake.set()

    @property
    def num_sessions(self) -> int:
        """Consumers connected now."""
        return len(self._sessions)

    async def stop(self) -> None:
        """Stop listening; sessions end with the loop."""
        self._expiry.cancel()
        self._listener.close()


class _Session:
    """One consumer's connection."""

    def __init__(self, server: TierServer, connection: Connection):
        self._server = server
        self._connection = connection
        self._streams: list[TierStream] = []
        self._prefilling: dict[str, StagedTransfer] = {}
        """Transfers whose outcome this consumer has not heard."""
        self._tables_wanted: deque[str] = deque()
        self._order = itertools.count()
        self.wake = asyncio.Event()

    async def run(self) -> None:
        sender = asyncio.ensure_future(self._send_frames())
        try:
            while True:
                message = await self._connection.receive()
                if isinstance(message, protocol.Fetch):
                    await self._fetch(message)
                elif isinstance(message, protocol.Release):
                    self._release(message)
                elif isinstance(message, protocol.TablesRequest):
                    self._want_tables(message)
                else:
                    raise ProtocolError(f"unexpected {type(message).__name__}")
        except ConnectionError as error:
            logger.info("lynx: %s", error)
        except ProtocolError as error:
            logger.warning("lynx: consumer %s: %s", self._connection.peer, error)
        finally:
            sender.cancel()

    async def _fetch(self, fetch: protocol.Fetch) -> None:
        try:
            transfer = self._server._store.lookup(fetch.transfer_id)
            if fetch.num_tokens != transfer.num_tokens or fetch.first_token >= fetch.num_tokens:
                raise TransferError(
                    f"asked for tokens {fetch.first_token} to {fetch.num_tokens} of a transfer "
                    f"with {transfer.num_tokens}"
                )
        except TransferError as error:
            logger.warning(
                "lynx: consumer %s asked for transfer %s: %s",
                self._connection.peer,
                fetch.transfer_id,
                error,
            )
            await self._connection.send(protocol.Failure(fetch.transfer_id, str(error)))
            return
        transfer.touch()
        self._server._events(
            "fetch",
            transfer.request_id,
            transfer.transfer_id,
            peer=self._connection.peer,
            first_token=fetch.first_token,
        )
        self._prefilling[fetch.transfer_id] = transfer
        order, stream = next(self._order), None
        for tier in transfer.buffers.tiers:
            frame_bytes = self._server._frame_bytes
            stream = TierStream(transfer, tier, fetch.first_token, frame_bytes, order, stream)
            if not stream.finished:
                self._streams.append(stream)
        self.wake.set()

    def _want_tables(self, request: protocol.TablesRequest) -> None:
        if request.digest not in self._tables_wanted:
            self._tables_wanted.append(request.digest)
        if len(self._tables_wanted) > MAX_TABLES_QUEUED:
            raise ProtocolError(f"more than {MAX_TABLES_QUEUED} tables requested at once")
        self.wake.set()

    def _release(self, release: protocol.Release) -> None:
        self._prefilling.pop(release.transfer_id, None)
        self._streams = [
            stream for stream in self._streams if stream.transfer.transfer_id != release.transfer_id
        ]
        self._server._store.drop(release.transfer_id, release.cause)

    def renew_leases(self) -> None:
        """A transfer that waits for its turn on the link is in contact."""
        for stream in self._streams:
            stream.transfer.touch()

    async def _abandon(self, transfer: StagedTransfer) -> None:
        """The producer dropped a transfer that this consumer is reading: tell it."""
        self._streams = [stream for stream in self._streams if stream.transfer is not transfer]
        self._prefilling.pop(transfer.transfer_id, None)
        try:
            self._server._store.lookup(transfer.transfer_id)
        except TransferError as error:
            await self._connection.send(protocol.Failure(transfer.transfer_id, str(error)))

    async def _send_frames(self) -> None:
        window = asyncio.Semaphore(FRAMES_IN_FLIGHT)
        while True:
            self._send_outcomes()
            if self._tables_wanted:  # ahead of all frames: none can be decoded without
                await self._send_tables(self._tables_wanted.popleft(), window)
                continue
            stream = min(
                (stream for stream in self._streams if stream.ready),
                key=lambda stream: (stream.tier, stream.order),
                default=None,
            )
            if stream is None:
                self.wake.clear()
                await self.wake.wait()
                continue
            await self._send_frame(stream, window)

    def _send_outcomes(self) -> None:
        """Ahead of all else: a first token is what a client waits for."""
        for transfer in list(self._prefilling.values()):
            if transfer.outcome is None and not transfer.dropped:
                continue
            del self._prefilling[transfer.transfer_id]
            if transfer.outcome is None:
                continue
            if transfer.outcome.cause:
                self._streams = [s for s in self._streams if s.transfer is not transfer]
            send = asyncio.ensure_future(self._connection.send(transfer.outcome))
            send.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def _send_tables(self, digest: str, window: asyncio.Semaphore) -> None:
        source = self._server._tables
        tables = source.find(digest) if source else None
        if tables is None:
            cause = "prefill does not have these tables (any more)"
            logger.warning("lynx: consumer %s: tables %s: %s", self._connection.peer, digest, cause)
            send = asyncio.ensure_future(self._connection.send(protocol.NoTables(digest, cause)))
            send.add_done_callback(lambda done: done.cancelled() or done.exception())
            return
        await window.acquire()
        payload = np.frombuffer(bytearray(tables.to_bytes()), np.uint8)
        await self._server._limiter.acquire(payload.nbytes)
        header = protocol.Tables(digest, payload.nbytes, checksum(payload))
        send = asyncio.ensure_future(self._connection.send(header, payload))
        send.add_done_callback(_freed(window))
        peer = self._connection.peer
        self._server._events("tables_sent", None, digest=digest, bytes=payload.nbytes, peer=peer)

    async def _send_frame(self, stream: TierStream, window: asyncio.Semaphore) -> None:
        if stream.transfer.dropped:
            await self._abandon(stream.transfer)
            return
        out = stream.take()
        if stream.finished:
            self._streams.remove(stream)
        await window.acquire()
        await self._server._limiter.acquire(out.payload.nbytes)
        if stream.transfer.dropped:
            window.release()
            await self._abandon(stream.transfer)
            return
        stream.transfer.touch()
        frame = protocol.Frame(
            stream.transfer.transfer_id,
            int(stream.tier),
            out.codec,
            out.tokens.start,
            len(out.tokens),
            out.payload.nbytes,
            checksum(out.payload),
            out.exceptions,
        )
        send = asyncio.ensure_future(self._connection.send(frame, out.payload))
        send.add_done_callback(_freed(window))
        if stream.finished:
            send.add_done_callback(_report(stream, self._server._events))


def _freed(window: asyncio.Semaphore) -> Callable[[asyncio.Future], None]:
    def done(future: asyncio.Future) -> None:
        window.release()
        # A lost connection is reported by the reader; here it only must not go unretrieved.
        if not future.cancelled():
            future.exception()

    return done


def _report(stream: TierStream, events: EventLog) -> Callable[[asyncio.Future], None]:
    def done(future: asyncio.Future) -> None:
        if not future.cancelled() and future.exception() is None:
            events(
                "tier_sent",
                stream.transfer.request_id,
                stream.transfer.transfer_id,
                tier=stream.tier.name.lower(),
                bytes=stream.sent_bytes,
            )

    return done
