# SPDX-License-Identifier: Apache-2.0
"""The steps of every request, for the events file and for the metrics.

The file has one JSON object a line. Each process appends whole lines, so that several may share a
file. Times are Unix seconds. docs/metrics.md names all events and their fields. Text is shortened
and escaped: some of it comes from peers and clients.
"""

import time
from pathlib import Path
from typing import Any

import msgspec

from lynx_connector.errors import shown
from lynx_connector.telemetry.events_file import EventsFile
from lynx_connector.telemetry.metrics import CONSUMER, Meter

_encode = msgspec.json.Encoder().encode

_LONGEST_TEXT = 512


class EventLog:
    """Events of one role (`producer` or `consumer`) of one instance.

    They go to a file, if there is a path, and to a meter, if there is one. A file that cannot be
    written costs events, which the meter counts, and nothing else.
    """

    def __init__(
        self, path: Path | None, role: str, meter: Meter | None = None, engine: str | None = None
    ):
        self._role = role
        self._meter = meter
        self._engine = engine
        self._file = None if path is None else EventsFile(Path(path))

    def for_consumer(self) -> "EventLog":
        """The same for the consumer's half of an instance that is both; they share the file."""
        if self._role == CONSUMER:
            return self
        other = EventLog(None, CONSUMER, self._meter, self._engine)
        other._file = self._file
        return other

    def __call__(
        self, event: str, request: str | None, transfer: str | None = None, **fields: Any
    ) -> None:
        """Record one event."""
        if self._meter is not None:
            self._meter(event, self._role, fields, request)
        if self._file is None:
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
        for key, value in line.items():
            if isinstance(value, str):
                line[key] = shown(value, _LONGEST_TEXT)
        if not self._file.write(_encode(line) + b"\n") and self._meter is not None:
            self._meter.add("lost_events", 1, self._role)

    def close(self) -> None:
        """Close the file, for both halves; later events are dropped."""
        if self._file is not None:
            self._file.close()


SILENT = EventLog(None, CONSUMER)
