# SPDX-License-Identifier: Apache-2.0
"""A server process with its own process group, its log and an end that leaves no orphan."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx
import psutil

_DIE_WITH_US = ("setpriv", "--pdeathsig", "TERM")
"""Ends the server when the thread that started it is gone, even by SIGKILL (util-linux)."""


class ServerError(RuntimeError):
    """A server did not start or died; the message holds the end of its log."""


class ServerProcess:
    """One server. `start` returns at once, `wait_ready` when it answers, `stop` when it is gone."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        url: str,
        log: Path,
        environment: Mapping[str, str],
    ):
        self.name = name
        self.command = list(command)
        self.url = url
        self.log = log
        self._environment = dict(environment)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        """True between start and the process's end, whoever ended it."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """Process id, also of a process that has ended; None before the first start."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start it, its output appended to the log; from a thread that outlives it."""
        if self.running:
            raise ServerError(f"{self.name} runs already")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            log.write(f"$ {' '.join(self.command)}\n".encode())
            log.flush()
            tie = _DIE_WITH_US if shutil.which(_DIE_WITH_US[0]) else ()
            self._process = subprocess.Popen(
                [*tie, *self.command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                # A group of its own: a Ctrl-C on the terminal is ours alone, and stop() reaches
                # the children. Not a session of its own: Linux schedules sessions as groups
                # (autogroup), and beside a thread that polls without end, as NIXL's does, the
                # other threads on its core were seen to wait for 30 s.
                process_group=0,
            )

    def wait_ready(self, timeout: float) -> None:
        """Wait until GET /health answers 200.

        Raises:
            ServerError: it ended before, or `timeout` seconds passed.
        """
        deadline = time.monotonic() + timeout
        while not self.healthy():
            self.check()
            if time.monotonic() > deadline:
                raise ServerError(f"{self.name} not ready after {timeout:.0f} s\n{self.tail()}")
            time.sleep(0.3)

    def healthy(self) -> bool:
        """True where GET /health answers 200 within two seconds."""
        try:
            return httpx.get(f"{self.url}/health", timeout=2, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    def check(self) -> None:
        """Raise ServerError, with the log's end, where it does not run."""
        if not self.running:
            code = self._process.returncode if self._process else "never started"
            raise ServerError(f"{self.name} is not running (exit status {code})\n{self.tail()}")

    def tail(self, lines: int = 25) -> str:
        """The log's last lines, under a line that names the file."""
        try:
            last = self.log.read_text(errors="replace").splitlines()[-lines:]
        except OSError:
            last = []
        return "\n".join([f"--- end of {self.log} ---", *last])

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        """Signal the whole group, as a crash would look to its peers; does not wait."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, how)

    def stop(self, grace: float = 15) -> None:
        """SIGTERM, after `grace` seconds SIGKILL to the group; returns when all of it is gone."""
        if self._process is None:
            return
        members = self._members()
        if self.running:
            # To the server alone: vLLM ends its children in order and removes its shared memory.
            self._process.send_signal(signal.SIGTERM)
        else:
            self.kill(signal.SIGTERM)
        _, left = psutil.wait_procs(members, timeout=grace)
        self.kill(signal.SIGKILL)
        for member in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()  # one that has left the group
        psutil.wait_procs(left, timeout=5)
        self._process.wait()

    def _members(self) -> list[psutil.Process]:
        """Every process of the group, orphaned ones too, and every descendant of the server."""
        assert self._process is not None
        group = self._process.pid
        members = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if os.getpgid(process.pid) == group:
                    members.append(process)
        with contextlib.suppress(psutil.NoSuchProcess):
            found = psutil.Process(group).children(recursive=True)
            members += [child for child in found if child not in members]
        return members
