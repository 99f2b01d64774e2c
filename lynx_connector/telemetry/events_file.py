# SPDX-License-Identifier: Apache-2.0
"""A file of lines that outlives its disk: what cannot be written is dropped, never raised.

Full disks, quotas, vanished folders, read-only remounts and dead pipes are told once each; the file
goes on when it can be written again. A file that was moved away (log rotation) is followed.
"""

import logging
import os
import stat
import threading
import time
from pathlib import Path

logger = logging.getLogger("vllm.lynx")

RETRY_SECONDS = 1.0
"""After a failure lines are dropped for that long before the next try; also how often it is looked
whether the file is still where it was."""

SETTLED_SECONDS = 5.0
"""A trouble is over when nothing has failed for that long: on a nearly full disk short lines fit
and long ones do not."""

_now = time.monotonic


class EventsFile:
    """Appends lines; thread-safe. Several processes may append to one file.

    A write never waits: a pipe that nobody reads loses lines. After a line that was written in
    part the next one begins on a line of its own.
    """

    def __init__(self, path: Path):
        self._path = path
        self._lock = threading.Lock()
        self._fd: int | None = None
        self._torn = False
        """The file may end in half a line."""
        self._closed = False
        self._trouble = False
        self._lost = 0
        self._failed_at = 0.0
        self._next_try = 0.0
        self._next_look = 0.0
        try:  # whoever follows the file finds it from the start, and a wrong path is told at once
            self._opened(_now())
        except OSError as error:
            self._failed(error, _now())

    def write(self, line: bytes) -> bool:
        """Append one whole line, with its newline; False if it is lost."""
        with self._lock:
            if self._closed:
                return True  # dropped on purpose
            now = _now()
            if now < self._next_try:
                self._lost += 1
                return False
            try:
                self._append(self._opened(now), line)
            except OSError as error:
                self._lost += 1
                self._failed(error, now)
                return False
            if self._trouble and now - self._failed_at >= SETTLED_SECONDS:
                self._recovered("is written again")
            return True

    def close(self) -> None:
        """Close the file; later lines are dropped."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._shut()
            if self._lost:
                self._recovered("is closed")

    def _opened(self, now: float) -> int:
        if now >= self._next_look:
            self._next_look = now + RETRY_SECONDS
            if self._fd is not None and not self._still_there(self._fd):
                self._shut()
        if self._fd is None:
            # O_NONBLOCK: opening a pipe, or writing to one, must not wait for its reader.
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK
            self._fd = os.open(self._path, flags, 0o666)
            self._torn = self._torn or _ends_within_a_line(self._path, self._fd)
        return self._fd

    def _still_there(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(fd))
        except OSError:
            return False

    def _append(self, fd: int, line: bytes) -> None:
        """O_APPEND keeps lines of different processes whole, as long as one write takes them."""
        rest = memoryview(b"\n" + line if self._torn else line)
        while rest:
            written = os.write(fd, rest)
            self._torn = self._torn or written > 0
            rest = rest[written:]
        self._torn = False

    def _failed(self, error: OSError, now: float) -> None:
        self._failed_at = now
        if not isinstance(error, BlockingIOError):  # a full pipe: its reader may come any moment
            self._next_try = now + RETRY_SECONDS
            self._shut()
        self._warn(error)

    def _shut(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            try:
                os.close(fd)
            except OSError as error:  # network file systems tell of a full disk here
                self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._trouble:
            self._trouble = True
            logger.warning(
                "lynx: events_file %s: %s; serving goes on, events are lost until it can be "
                "written again",
                self._path,
                error.strerror or error,
            )

    def _recovered(self, how: str) -> None:
        logger.info("lynx: events_file %s %s; %d events were lost", self._path, how, self._lost)
        self._trouble = False
        self._lost = 0


def _ends_within_a_line(path: Path, fd: int) -> bool:
    """Whether a crash, or another process, has left half a line at the file's end."""
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or not found.st_size:
        return False
    try:
        with path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"
    except OSError:
        return True  # not readable: an empty line does no harm
