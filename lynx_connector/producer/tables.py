# SPDX-License-Identifier: Apache-2.0
"""The producer's learned tables: which versions there are, and which one is new."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict

from lynx_connector.codec import KltTables
from lynx_connector.codec.table_store import TableStore

logger = logging.getLogger("vllm.lynx.tables")

MAX_VERSIONS = 4
"""Versions kept for requests whose first chunk is still on its way to the worker. Transfers hold
theirs themselves."""


class ProducerTables:
    """Versions of one rank's tables, the newest last. Thread-safe."""

    def __init__(self, store: TableStore):
        self._store = store
        self._lock = threading.Lock()
        self._versions: OrderedDict[str, KltTables] = OrderedDict()
        self._unreported = False
        self.learned_tokens = 0
        """Tokens that the newest tables were learned from."""
        if (found := store.load_current()) is not None:
            tables, self.learned_tokens = found
            self._versions[tables.digest] = tables
            logger.info(
                "lynx: beginning with learned tables %s (%d tokens) from %s",
                tables.digest,
                self.learned_tokens,
                store.folder,
            )

    @property
    def current(self) -> str:
        """Digest of the newest tables; empty while there are none."""
        with self._lock:
            return next(reversed(self._versions), "")

    def find(self, digest: str) -> KltTables | None:
        """A version by its digest."""
        with self._lock:
            return self._versions.get(digest)

    def forget(self, digest: str) -> None:
        """Tables from disk turned out not to be usable: begin without."""
        with self._lock:
            self._versions.pop(digest, None)
            self.learned_tokens = 0

    def publish(self, tables: KltTables, tokens: int) -> None:
        """Make `tables` the newest, keep them on disk, and have them reported."""
        self._store.save_current(tables, tokens)
        with self._lock:
            self._versions[tables.digest] = tables
            self._versions.move_to_end(tables.digest)
            while len(self._versions) > MAX_VERSIONS:
                self._versions.popitem(last=False)
            self.learned_tokens = tokens
            self._unreported = True

    def take_report(self) -> str | None:
        """The newest digest if it changed since the last call."""
        with self._lock:
            if not self._unreported:
                return None
            self._unreported = False
            return next(reversed(self._versions))
