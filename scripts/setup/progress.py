# SPDX-License-Identifier: Apache-2.0
"""What is shown while pip works for minutes."""

from __future__ import annotations

import shutil
import sys
import threading
import time

from .base import say


class Progress:
    """pip's work as one line that changes on a terminal, and as a line now and then elsewhere."""

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()
        self._seconds = 1 if self._terminal else 20
        self._started = time.monotonic()
        self._packages = 0
        self._what = "starting pip"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def take(self, line: str) -> None:
        """Take one line of pip's output."""
        if line.startswith("Collecting "):
            self._packages += 1
            self._what = f"package {self._packages}: {line.split()[1]}"
        elif line.lstrip().startswith(("Downloading ", "Installing collected")):
            self._what = line.strip()

    def end(self) -> None:
        """Show no more."""
        self._ended.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._ended.wait(self._seconds):
            text = f"      {time.monotonic() - self._started:3.0f} s  {self._what}"
            if self._terminal:
                width = shutil.get_terminal_size().columns - 1
                sys.stdout.write("\r\033[K" + text[:width])
                sys.stdout.flush()
            else:
                say(text[:110])
        if self._terminal:
            sys.stdout.write("\r\033[K")
