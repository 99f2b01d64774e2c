# SPDX-License-Identifier: Apache-2.0
"""The events file: one JSON object a line for every step of every request.

Each process appends whole lines, so that several may share a file. Times are Unix seconds.
"""

import os
import time
from pathlib import Path
from typing import Any

import msgspec

_encode = msgspec.json.Encoder().encode


class EventLog:
    """Appends events of one role (`producer` or `consumer`); a no-op without a path."""

    def __init__(self, path: Path | None, role: str):
        self._role = role
        self._fd = None if path is None else os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def __call__(
        self, event: str, request: str | None, transfer: str | None = None, **fields: Any
    ) -> None:
        """Append one event. O_APPEND keeps lines of different processes whole."""
        if self._fd is None:
            return
        line = {
            "t": time.time(),
            "role": self._role,
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
