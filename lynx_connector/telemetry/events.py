# SPDX-License-Identifier: Apache-2.0
"""The steps of every request, for the events file and for the metrics.

The file has one JSON object a line. Each process appends whole lines, so that several may share a
file. Times are Unix seconds. docs/metrics.md names all events and their fields.
"""

import os
import time
from pathlib import Path
from typing import Any

import msgspec

from lynx_connector.telemetry.metrics import CONSUMER, Meter

_encode = msgspec.json.Encoder().encode


class EventLog:
    """Events of one role (`producer` or `consumer`) of one instance.

    They go to a file, if there is a path, and to a meter, if there is one.
    """

    def __init__(
        self, path: Path | None, role: str, meter: Meter | None = None, engine: str | None = None
    ):
        self._role = role
        self._meter = meter
        self._engine = engine
        self._fd = None if path is None else os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def for_consumer(self) -> "EventLog":
        """The same for the consumer's half of an instance that is both."""
        if self._role == CONSUMER:
            return self
        other = EventLog(None, CONSUMER, self._meter, self._engine)
        other._fd = None if self._fd is None else os.dup(self._fd)
        return other

    def __call__(
        self, event: str, request: str | None, transfer: str | None = None, **fields: Any
    ) -> None:
        """Record one event. O_APPEND keeps lines of different processes whole."""
        if self._meter is not None:
            self._meter(event, self._role, fields)
        if self._fd is None:
            return
        line = {
            "t": time.time(),
            "role": self._role,
            "engine": self._engine,
            "event": event,
            "request": request,
            "transfer": transfer,
            **fields,
        }
        os.write(self._fd, _encode(line) + b"\n")

    def close(self) -> None:
        """Close the file; later events are dropped."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


SILENT = EventLog(None, CONSUMER)
