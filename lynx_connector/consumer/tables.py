# SPDX-License-Identifier: Apache-2.0
"""The consumer's learned tables: in memory, on disk, or still to be fetched."""

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable

import numpy as np

from lynx_connector.codec import CodecError, KltTables, KVGeometry
from lynx_connector.codec.table_store import TableStore
from lynx_connector.errors import ProtocolError

logger = logging.getLogger("vllm.lynx.tables")

MAX_IN_MEMORY = 8
"""Tables kept, unless more are in use; others are read from disk again."""


class ConsumerTables:
    """Tables by digest; a `TablesSink` for the transport. Thread-safe.

    `prepare` gets new tables before anybody else does, outside the main thread: for what the first
    transfer with them should not wait for.
    """

    def __init__(
        self, store: TableStore, geometry: KVGeometry, prepare: Callable[[KltTables], object]
    ):
        self._store = store
        self._prepare = prepare
        self._geometry = geometry
        self._tables: OrderedDict[str, KltTables] = OrderedDict()
        self._users: Counter[str] = Counter()
        self._lock = threading.Lock()
        self.max_bytes = KltTables.max_bytes(geometry)

    def hold(self, digest: str) -> None:
        """A transfer needs these tables: they stay in memory once they are there."""
        with self._lock:
            self._users[digest] += 1

    def release(self, digest: str) -> None:
        """The transfer has ended."""
        with self._lock:
            self._users[digest] -= 1
            if not self._users[digest]:
                del self._users[digest]

    def get(self, digest: str) -> KltTables | None:
        """Tables in memory (cheap: asked in every step)."""
        with self._lock:
            tables = self._tables.get(digest)
            if tables is not None:
                self._tables.move_to_end(digest)
            return tables

    def known(self, digest: str) -> bool:
        """Whether tables are here; reads them from disk if need be."""
        if self.get(digest) is not None:
            return True
        tables = self._store.load(digest)
        if tables is None:
            return False
        try:
            self._keep(tables)
        except CodecError as error:
            logger.warning("lynx: stored tables %s are not usable: %s", digest, error)
            return False
        return True

    def accept(self, digest: str, data: np.ndarray) -> None:
        """Keep what a producer sent.

        Raises:
            CodecError, ProtocolError: naming what is wrong with it.
        """
        tables = KltTables.from_bytes(data.tobytes(), self._geometry)
        if tables.digest != digest:
            raise ProtocolError(f"content has hash {tables.digest}")
        self._keep(tables)
        self._store.save(tables)

    def _keep(self, tables: KltTables) -> None:
        self._prepare(tables)
        with self._lock:
            self._tables[tables.digest] = tables
            unused = [digest for digest in self._tables if digest not in self._users]
            for digest in unused[: max(0, len(self._tables) - MAX_IN_MEMORY)]:
                del self._tables[digest]
