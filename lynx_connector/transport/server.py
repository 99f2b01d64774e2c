# SPDX-License-Identifier: Apache-2.0
"""The producer's end: serves staged tiers to every consumer that passes the handshake."""

import asyncio
import logging
from typing import Protocol

from lynx_connector.errors import ProtocolError, TransferError
from lynx_connector.telemetry.events import EventLog
from lynx_connector.tiers.outbound import TierStream
from lynx_connector.tiers.staging import StagedTransfer, StagingStore
from lynx_connector.transport.connection import Connection
from lynx_connector.transport.door import Door
from lynx_connector.transport.handshake import PROBE, Identity
from lynx_connector.transport.rate import RateMeter
from lynx_connector.transport.sender import LinkSender
from lynx_connector.transport.sources import Delivery, TablesFinder, TablesSource, TierSource
from lynx_connector.wire import messages

logger = logging.getLogger("vllm.lynx.server")

MAX_TABLES_QUEUED = 16


class ServedTables(TablesFinder, Protocol):
    """Where the server finds learned tables."""

    @property
    def current(self) -> str:
        """Digest to announce to new consumers; empty: none."""


class TierServer:
    """One door, one reader per connection, and one sender for all of them."""

    def __init__(
        self,
        store: StagingStore,
        identity: Identity,
        events: EventLog,
        frame_bytes: int,
        link_mbit: float,
        tables: ServedTables | None = None,
        data_ports: str = "",
    ):
        self._store = store
        self._tables = tables
        self._door = Door(identity, self._serve, self._announced, data_ports)
        self._events = events
        self._frame_bytes, self._link_mbit = frame_bytes, link_mbit
        self._sessions: set[_Session] = set()
        self.rates = RateMeter()
        self.step_ms = 0.0
        """Decode step time that a consumer named last; 0: none did."""
        self.port = 0

    async def start(self, port: int, host: str = "") -> None:
        """Listen on `port` (0: any free one) of `host` (empty: everywhere) and expire leases.

        Raises:
            TransferError: if the port is taken, or the host is not this one's.
        """
        await self._door.open(host, port)
        self.port = self._door.port
        self._sender = LinkSender(self._frame_bytes, self._link_mbit, self.rates)
        self._sending = asyncio.ensure_future(self._sender.run())
        self._expiry = asyncio.ensure_future(self._expire_leases())

    def _announced(self) -> str:
        return self._tables.current if self._tables else ""

    async def _expire_leases(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            for session in self._sessions:
                session.keep_alive()
            for transfer in self._store.expire():
                logger.warning(
                    "lynx: lease of transfer %s (request %s) expired, %d bytes of staging freed",
                    transfer.transfer_id,
                    transfer.request_id,
                    transfer.num_bytes,
                )
                self.notify()

    async def _serve(self, connection: Connection, hello: messages.Hello) -> None:
        if hello.compat == PROBE:
            return  # it has seen what it wanted to know
        session = _Session(self, connection)
        self._sessions.add(session)
        logger.info("lynx: consumer %s connected", connection.peer)
        try:
            await session.run()
        finally:
            self._sessions.discard(session)

    def notify(self) -> None:
        """New rows were encoded: wake the sender if it waits for them."""
        for session in self._sessions:
            session.send_outcomes()
        self._sender.wake()

    @property
    def num_sessions(self) -> int:
        """Consumers connected now."""
        return len(self._sessions)

    async def stop(self) -> None:
        """Stop listening and end all sessions."""
        self._expiry.cancel()
        self._sending.cancel()
        await self._door.close()


class _Session:
    """One consumer's connection: reads what it asks for, queues what it gets."""

    def __init__(self, server: TierServer, connection: Connection):
        self._server = server
        self._connection = connection
        self._prefilling: dict[str, StagedTransfer] = {}
        """Transfers whose outcome this consumer has not heard."""

    async def run(self) -> None:
        try:
            while True:
                message = await self._connection.receive()
                if isinstance(message, messages.Fetch):
                    await self._fetch(message)
                elif isinstance(message, messages.Hold):
                    self._hold(message)
                elif isinstance(message, messages.Release):
                    self._release(message)
                elif isinstance(message, messages.TablesRequest):
                    self._want_tables(message)
                else:
                    raise ProtocolError(f"unexpected {type(message).__name__}")
        except ConnectionError as error:
            logger.info("lynx: %s", error)
        except ProtocolError as error:
            logger.warning("lynx: consumer %s: %s", self._connection.peer, error)
        finally:
            self._server._sender.forget(self._connection)

    async def _fetch(self, fetch: messages.Fetch) -> None:
        server = self._server
        try:
            transfer = server._store.fetch(fetch.transfer_id, fetch.first_token, fetch.num_tokens)
        except TransferError as error:
            logger.warning(
                "lynx: consumer %s asked for transfer %s: %s",
                self._connection.peer,
                fetch.transfer_id,
                error,
            )
            server._events(
                "fetch_refused",
                None,
                fetch.transfer_id,
                peer=self._connection.peer,
                cause=str(error),
            )
            await self._connection.send(messages.Failure(fetch.transfer_id, str(error)))
            return
        server.step_ms = fetch.step_ms or server.step_ms
        server._events(
            "fetch",
            transfer.request_id,
            transfer.transfer_id,
            peer=self._connection.peer,
            first_token=fetch.first_token,
        )
        self._connection.post(messages.Prefilling())
        self._prefilling[fetch.transfer_id] = transfer
        order, delivery, stream = server._sender.number(), Delivery(), None
        for tier in transfer.buffers.tiers:
            stream = TierStream(transfer, tier, fetch.first_token, stream)
            if not stream.finished:
                source = TierSource(
                    server._sender,
                    server._store,
                    server._events,
                    self._connection,
                    order,
                    stream,
                    delivery,
                )
                server._sender.add(source)
        self.send_outcomes()

    def _hold(self, hold: messages.Hold) -> None:
        for transfer_id in hold.transfer_ids:
            self._server._store.touch(transfer_id)

    def _want_tables(self, request: messages.TablesRequest) -> None:
        sender = self._server._sender
        queued = [s for s in sender.sources(self._connection) if isinstance(s, TablesSource)]
        if any(source.key == request.digest for source in queued):
            return
        if len(queued) >= MAX_TABLES_QUEUED:
            raise ProtocolError(f"more than {MAX_TABLES_QUEUED} tables requested at once")
        tables, events = self._server._tables, self._server._events
        sender.add(TablesSource(tables, events, self._connection, sender.number(), request.digest))

    def _release(self, release: messages.Release) -> None:
        self._prefilling.pop(release.transfer_id, None)
        self._server._sender.cancel(self._connection, release.transfer_id)
        self._server._store.release(release.transfer_id, release.cause)

    def send_outcomes(self) -> None:
        """Ahead of all frames: a first token is what a client waits for."""
        for transfer in list(self._prefilling.values()):
            if transfer.outcome is None and not transfer.dropped:
                continue
            del self._prefilling[transfer.transfer_id]
            if transfer.outcome is None:
                continue
            if transfer.outcome.cause:
                self._server._sender.cancel(self._connection, transfer.transfer_id)
            self._connection.post(transfer.outcome)

    def keep_alive(self) -> None:
        """A transfer that waits for its turn on the link, or for its prefill, is in contact, unless
        its peer hangs."""
        if self._server._sender.stalled(self._connection):
            return
        waits = False
        for source in self._server._sender.sources(self._connection):
            if isinstance(source, TierSource):
                source.transfer.touch()
                waits |= source.transfer.encoded < source.transfer.num_tokens
        if waits:
            self._connection.post(messages.Prefilling())
