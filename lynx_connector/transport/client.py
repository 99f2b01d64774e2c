# SPDX-License-Identifier: Apache-2.0
"""The consumer's end: one connection per producer worker, shared by all transfers from it."""

import asyncio
import contextlib
import functools
import logging
import math
import time
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

import numpy as np

from lynx_connector.errors import LynxError, ProtocolError, TransferError
from lynx_connector.telemetry.events import SILENT, EventLog
from lynx_connector.transport.address import Resolver, bare_host, printable
from lynx_connector.transport.connection import Connection, checksum
from lynx_connector.transport.handshake import Identity
from lynx_connector.transport.holds import Holds
from lynx_connector.transport.meeting import Address, DeafPeerError, meet
from lynx_connector.transport.seal import BrokenSealError
from lynx_connector.transport.tables import TablesSink, WantedTables
from lynx_connector.wire import messages
from lynx_connector.wire.allowed import AllowedPrefills

logger = logging.getLogger("vllm.lynx.client")

PROBE_SECONDS = 2.0
"""How long a producer that was silent for a whole timeout is given to answer the next fetch, or one
that did not answer at all the next connection."""
MAX_DEAF = 1024


Meet = Callable[[], Coroutine[Any, Any, tuple[Connection, messages.Ready]]]


class Sink(Protocol):
    """Where the frames of one transfer go. Called from the transport thread."""

    transfer_id: str
    tables: str
    """Digest of the tables that its rows need; empty: none."""

    def buffer(self, frame: messages.Frame) -> np.ndarray:
        """Memory for a frame's payload; raises TransferError if the frame is not acceptable."""

    def landed(self, frame: messages.Frame, payload: np.ndarray) -> bool:
        """The payload is in the buffer and its checksum holds; True if no frame is to come.

        Raises TransferError if its content is not acceptable.
        """

    def prefilled(self, first_token: int | None) -> None:
        """The prefill has ended well, and sampled this token (None: not handed over)."""

    def failed(self, cause: str) -> None:
        """Nothing more will arrive."""


class TierClient:
    """Fetches transfers and the tables they need. All methods run in the transport loop."""

    def __init__(
        self,
        identity: Identity,
        timeout_seconds: float,
        tables: TablesSink,
        events: EventLog = SILENT,
        allowed: AllowedPrefills | None = None,
    ):
        self._identity = identity
        self._allowed = allowed or AllowedPrefills()
        self._events = events
        self._tables = tables
        self._timeout = timeout_seconds
        self._resolver = Resolver()
        self._peers: dict[Address, _Peer] = {}
        self._deaf: dict[Address, None] = {}
        """Where nobody answered when last asked, the newest last."""
        self._tasks: set[asyncio.Task] = set()

    def fetch(
        self,
        address: Address,
        sink: Sink,
        first_token: int,
        num_tokens: int,
        step_ms: float = 0.0,
    ) -> None:
        """Ask for the tiers of a transfer; the sink hears the rest. step_ms: see `Fetch`."""
        message = messages.Fetch(sink.transfer_id, first_token, num_tokens, step_ms)
        self._spawn(self._fetch(address, sink, message))

    def hold(self, address: Address, transfer_id: str) -> None:
        """Keep a transfer's lease until it is fetched or released; never fails."""
        self._peer(address).holds.add(transfer_id)

    async def _fetch(self, address: Address, sink: Sink, message: messages.Fetch) -> None:
        peer = self._peer(address)
        peer.holds.discard(sink.transfer_id)
        peer.add(sink)
        try:
            await peer.want_tables(sink.tables)
            await peer.send(message)
        except (TransferError, ConnectionError) as error:
            peer.fail(sink, str(error))

    def release(self, address: Address, transfer_id: str, cause: str) -> None:
        """Tell the producer that a transfer is not needed (any more); never fails."""
        self._spawn(self._release(address, transfer_id, cause))

    async def _release(self, address: Address, transfer_id: str, cause: str) -> None:
        peer = self._peer(address)
        peer.forget(transfer_id)
        try:
            await peer.send(messages.Release(transfer_id, cause[: messages.MAX_CAUSE]))
        except (TransferError, ConnectionError) as error:
            logger.info("lynx: could not release transfer %s: %s", transfer_id, error)

    def _peer(self, address: Address) -> "_Peer":
        address = (bare_host(address[0]), address[1])
        peer = self._peers.get(address)
        if peer is None or peer.lost:
            peer = _Peer(address, self._timeout, self._tables, self._events)
            self._peers[address] = peer
            self._spawn(self._run(peer))
        return peer

    async def _run(self, peer: "_Peer") -> None:
        try:
            await peer.run(functools.partial(self._meet, peer.address))
        finally:
            if self._peers.get(peer.address) is peer:
                del self._peers[peer.address]

    async def _meet(self, address: Address) -> tuple[Connection, messages.Ready]:
        """Connect; who did not answer the last time is given little time now."""
        self._allowed.check(address[0])
        patience = PROBE_SECONDS if address in self._deaf else math.inf
        try:
            connection, _, ready = await meet(address, self._identity, self._resolver, patience)
        except DeafPeerError:
            self._deaf[address] = None
            if len(self._deaf) > MAX_DEAF:
                del self._deaf[next(iter(self._deaf))]
            raise
        self._deaf.pop(address, None)
        return connection, ready

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @property
    def num_peers(self) -> int:
        """Connections open now."""
        return len(self._peers)

    @property
    def num_transfers(self) -> int:
        """Transfers under way."""
        return sum(len(peer.sinks) for peer in self._peers.values())


class _Peer:
    """One connection and the sinks of the transfers that come over it."""

    def __init__(
        self,
        address: Address,
        timeout_seconds: float,
        tables: TablesSink,
        events: EventLog,
    ):
        self.address = address
        self._events = events
        self.sinks: dict[str, Sink] = {}
        self.lost = False
        self._timeout = timeout_seconds
        self._heard = time.monotonic()
        self._connection: asyncio.Future[Connection] = asyncio.get_running_loop().create_future()
        self._name = printable(*address)
        self._wanted = WantedTables(self._name, tables)
        self.holds = Holds(self.send)
        self._silent = False
        """It was silent for a whole timeout, and nothing was heard of it since."""
        self._complete: set[str] = set()
        """Transfers whose frames are all here, but not their tables."""
        self._keeping: set[asyncio.Task[None]] = set()
        """Tables that have arrived and are being made ready, while frames go on."""

    def add(self, sink: Sink) -> None:
        if not self.sinks:
            self._heard = time.monotonic()
        self.sinks[sink.transfer_id] = sink

    def forget(self, transfer_id: str) -> None:
        self.sinks.pop(transfer_id, None)
        self.holds.discard(transfer_id)
        self._complete.discard(transfer_id)

    def fail(self, sink: Sink, cause: str) -> None:
        self._complete.discard(sink.transfer_id)
        if self.sinks.pop(sink.transfer_id, None) is not None:
            sink.failed(cause)

    async def send(self, message: messages.Message) -> None:
        connection = await asyncio.shield(self._connection)
        await connection.send(message)

    async def want_tables(self, digest: str) -> None:
        """Ask for tables unless they are here or asked for."""
        if digest and (request := await self._wanted.request(digest)) is not None:
            await self.send(request)

    async def run(self, meet: Meet) -> None:
        """Connect, receive until the connection ends, then fail what is left."""
        cause = f"connection to {self._name} closed"
        connection = None
        beside = [asyncio.ensure_future(self._watch())]
        try:
            connection, ready = await meet()
            self._connection.set_result(connection)
            beside.append(asyncio.ensure_future(self._keep_leases()))
            await self.want_tables(ready.tables)
            while True:
                message = await connection.receive()
                self._heard, self._silent = time.monotonic(), False
                if isinstance(message, messages.Frame):
                    await self._receive_frame(connection, message)
                elif isinstance(message, messages.Tables):
                    await self._receive_tables(connection, message)
                elif isinstance(message, messages.NoTables):
                    self._wanted.gone(message.digest)
                    self._without_tables(connection, message.digest, message.cause)
                elif isinstance(message, messages.Failure):
                    if sink := self.sinks.get(message.transfer_id):
                        self.fail(sink, f"{self._name}: {message.cause}")
                elif isinstance(message, messages.Prefilled):
                    self._prefilled(message)
                elif isinstance(message, messages.Sent):
                    self._sent(connection, message)
                elif not isinstance(message, messages.Prefilling):
                    raise ProtocolError(f"unexpected {type(message).__name__}")
        except (LynxError, ConnectionError) as error:
            cause = str(error)
        finally:
            self.lost = True
            for task in (*beside, *self._keeping):
                task.cancel()
            if not self._connection.done():
                self._connection.set_exception(TransferError(cause))
                self._connection.exception()  # retrieved: nobody may be waiting
            for sink in list(self.sinks.values()):
                self.fail(sink, cause)
            if connection is not None:
                await connection.close()

    async def _receive_frame(self, connection: Connection, frame: messages.Frame) -> None:
        sink = self.sinks.get(frame.transfer_id)
        buffer = None
        if sink is not None:
            try:
                buffer = sink.buffer(frame)
            except TransferError as error:
                self._give_up(connection, sink, f"{self._name}: {error}")
        wanted = buffer is not None
        if buffer is None:  # cancelled or refused: the bytes are on their way all the same
            buffer = np.empty(frame.num_bytes, np.uint8)
        broken = ""
        try:
            await connection.receive_payload(frame, buffer)
        except BrokenSealError as error:
            broken = str(error)
        self._events(
            "frame_received",
            None,
            frame.transfer_id,
            tier=messages.tier_name(frame.tier),
            bytes=frame.num_bytes,
            tokens_done=frame.first_token + frame.num_tokens,
            wanted=wanted,
        )
        if not wanted:
            return
        assert sink is not None
        if not broken and checksum(buffer) != frame.checksum:
            broken = "checksum differs"
        if broken:
            self._give_up(
                connection,
                sink,
                f"{self._name}: corrupt {messages.tier_name(frame.tier)} frame at token "
                f"{frame.first_token} ({broken})",
            )
            return
        try:
            complete = sink.landed(frame, buffer)
        except TransferError as error:
            self._give_up(connection, sink, f"{self._name}: {error}")
            return
        if complete and sink.tables in self._wanted:
            self._complete.add(frame.transfer_id)  # the watch goes on until its tables are here
        elif complete:
            self.sinks.pop(frame.transfer_id, None)

    def _prefilled(self, message: messages.Prefilled) -> None:
        sink = self.sinks.get(message.transfer_id)
        if sink is None:
            return  # complete, and decoding without it, or cancelled
        if message.cause:
            self.fail(sink, f"{self._name}: {message.cause}")
        else:
            sink.prefilled(message.first_token)

    def _sent(self, connection: Connection, message: messages.Sent) -> None:
        """What is not here by now will not come, however much else does."""
        sink = self.sinks.get(message.transfer_id)
        if sink is not None and message.transfer_id not in self._complete:
            self._give_up(connection, sink, f"{self._name}: all was sent, but frames are missing")

    async def _receive_tables(self, connection: Connection, header: messages.Tables) -> None:
        buffer = self._wanted.buffer(header)
        with contextlib.suppress(BrokenSealError):  # all zeros: not the tables that were announced
            await connection.receive_payload(header, buffer)
        task = asyncio.ensure_future(self._keep_tables(connection, header, buffer))
        self._keeping.add(task)
        task.add_done_callback(self._keeping.discard)

    async def _keep_tables(
        self, connection: Connection, header: messages.Tables, buffer: np.ndarray
    ) -> None:
        try:
            again, cause = await self._wanted.arrived(header, buffer)
        except Exception as error:
            logger.exception(
                "lynx: tables %s from %s cannot be kept: transfers that need them fail",
                header.digest,
                self._name,
            )
            again, cause = None, f"cannot be kept: {error}"
        if again is not None:
            with contextlib.suppress(LynxError, ConnectionError):  # `run` sees the end, and tells
                await connection.send(again)
        elif cause is not None:
            self._without_tables(connection, header.digest, cause)
        else:
            for transfer_id in [t for t in self._complete if self._needs(t, header.digest)]:
                self._complete.discard(transfer_id)
                self.sinks.pop(transfer_id, None)

    def _needs(self, transfer_id: str, digest: str) -> bool:
        sink = self.sinks.get(transfer_id)
        return sink is None or sink.tables == digest

    def _without_tables(self, connection: Connection, digest: str, cause: str) -> None:
        for sink in [sink for sink in self.sinks.values() if sink.tables == digest]:
            self._give_up(connection, sink, f"{self._name}: tables {digest}: {cause}")

    def _give_up(self, connection: Connection, sink: Sink, cause: str) -> None:
        self.fail(sink, cause)
        release = messages.Release(sink.transfer_id, cause[: messages.MAX_CAUSE])
        task = asyncio.ensure_future(connection.send(release))
        task.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def _keep_leases(self) -> None:
        with contextlib.suppress(TransferError, ConnectionError):  # `run` sees the end, and tells
            await self.holds.run()

    async def _watch(self) -> None:
        """A producer that is silent while transfers are open has hung, or its host is gone.

        The first transfers wait for the whole timeout; then it is known to be silent, and further
        ones give it little time, until it is heard of again.
        """
        while True:
            await asyncio.sleep(min(1.0, self._timeout / 4))
            patience = min(PROBE_SECONDS, self._timeout) if self._silent else self._timeout
            if self.sinks and time.monotonic() - self._heard > patience:
                known = "" if not self._silent else f", as for {self._timeout:g} s before"
                self._silent = True
                for sink in list(self.sinks.values()):
                    self.fail(sink, f"{self._name}: silent for {patience:g} s{known}")
            for digest in self._wanted.overdue(self._timeout):
                for sink in [sink for sink in self.sinks.values() if sink.tables == digest]:
                    cause = f"tables {digest} not sent within {self._timeout:g} s"
                    self.fail(sink, f"{self._name}: {cause}")
