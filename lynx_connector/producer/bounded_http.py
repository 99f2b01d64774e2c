# SPDX-License-Identifier: Apache-2.0
"""HTTP connections that strangers cannot keep: uvicorn's, but for those on which nothing is asked.

uvicorn ends idle connections only after their first answer, and not once a further request has
begun to come in.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

LOOK_SECONDS = 5.0
"""A connection without a request at two looks in turn is closed."""

MAX_CONNECTIONS = 4096
"""More are answered with status 503."""


class BoundedProtocol(H11Protocol):
    """One connection, watched."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.loop.call_later(LOOK_SECONDS, self._look, True)

    def _look(self, idle_before: bool) -> None:
        if self.transport.is_closing():
            return
        idle = self.cycle is None or self.cycle.response_complete
        if idle and idle_before:
            self.transport.abort()
        else:
            self.loop.call_later(LOOK_SECONDS, self._look, idle)
