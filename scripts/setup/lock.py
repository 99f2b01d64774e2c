# SPDX-License-Identifier: Apache-2.0
"""One set-up at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator

from .base import ROOT, say


@contextlib.contextmanager
def only_one(folder: str = ROOT) -> Iterator[None]:
    """Let a second set-up of the same folder wait for the first."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another set-up is at work here: waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
