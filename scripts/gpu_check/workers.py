# SPDX-License-Identifier: Apache-2.0
"""One worker after the other until all cases have run: what kills one costs its own case only."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import IO, Any

from scripts.gpu_check.cases import Case
from scripts.gpu_check.checkout import ROOT

START_SECONDS, CASE_SECONDS = 90, 150
Row = dict[str, Any]


def probe() -> dict[str, Any]:
    """What a worker says of the machine. Raises RuntimeError, with its words, if none starts."""
    worker = Worker([], dict(os.environ))
    for line in worker.lines(lambda: START_SECONDS):
        worker.end()
        return line["machine"]
    raise RuntimeError(f"no worker starts here: {worker.end()}")


def run_cases(
    cases: list[Case], environment: dict[str, str], ends: float, show: Callable[[Row], None]
) -> tuple[list[Row], list[Case]]:
    """Rows of all operations, and the cases that there was no time for until `ends`, a time of
    time.monotonic()."""
    rows: list[Row] = []

    def keep(case: Case, row: Row) -> None:
        rows.append(case.as_row() | row)
        show(rows[-1])

    left = list(cases)
    while left and time.monotonic() < ends:
        worker = Worker(left, environment)
        current, told = 0, False
        for line in worker.lines(lambda: min(CASE_SECONDS, ends - time.monotonic())):
            if "case" in line:
                current, told = line["case"], False
            elif "row" in line:
                keep(left[current], line["row"])
                told = not line["row"]["ok"]
        words = worker.end()
        if words is None:
            return rows, []
        if time.monotonic() >= ends:
            return rows, left[current:]
        if not told:  # it could not say itself
            keep(left[current], {"ok": False, "differs": words})
        left = left[current + 1 :]
    return rows, left


class Worker:
    """A running `scripts.gpu_check.worker`."""

    module = "scripts.gpu_check.worker"

    def __init__(self, cases: list[Case], environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", self.module, json.dumps(cases)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        assert self._process.stdout and self._process.stderr
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._said: deque[str] = deque(maxlen=1)
        self._readers = [
            threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True),
            threading.Thread(target=self._keep, args=(self._process.stderr,), daemon=True),
        ]
        for reader in self._readers:
            reader.start()
        self._late = False

    def lines(self, patience: Callable[[], float]) -> Iterator[Row]:
        """What it says, until it ends or says nothing for as many seconds as `patience` gives."""
        while True:
            try:
                line = self._lines.get(timeout=max(patience(), 0.01))
            except queue.Empty:
                self._late = True
                return
            if line is None:
                return
            if line.startswith("{"):  # the rest is the compilers' and libraries' talk
                yield json.loads(line)

    def end(self) -> str | None:
        """None if it has ended well; otherwise how, and its last line of stderr."""
        if self._late:
            self._process.kill()
        status = self._process.wait()
        for reader in self._readers:
            reader.join(timeout=10)  # what it has started may hold the pipes
        if status == 0:
            return None
        how = "took too long" if self._late else f"ended with status {status}"
        return f"the worker {how}: {self._said[0] if self._said else 'it said nothing'}"

    def _read(self, stdout: IO[str]) -> None:
        for line in stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _keep(self, stderr: IO[str]) -> None:
        self._said.extend(line.strip() for line in stderr if line.strip())
