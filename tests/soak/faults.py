# SPDX-License-Identifier: Apache-2.0
"""Servers that die, hang and are told to go, at times that the seed decides, and come back."""

import asyncio
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lynx_connector.testbed.process import ServerError, ServerProcess
from tests.soak.servers import ready

KILL, STOP, TERM = "kill", "stop", "term"
FAULTS = (KILL, STOP, TERM)
STOP_SECONDS = (3.0, 20.0)
DEAD_SECONDS = 3.0
RESTARTS = 3
START_TIMEOUT = 420.0


@dataclass
class Window:
    """When something was wrong with a server; `end` is None while it still is. Unix seconds."""

    what: str
    server: str
    start: float
    end: float | None = None
    note: str = ""

    def overlaps(self, start: float, end: float, grace: float) -> bool:
        """Whether a request that lived from `start` to `end` can have met it."""
        return start <= (self.end or float("inf")) + grace and end >= self.start


class ServerFaults:
    """One fault after the other, so that never all servers of a role are away at once, where
    there are two.

    Args:
        servers: what faults may meet.
        every: seconds between the end of one and the start of the next, on average.
        before, after: told with the server before a fault, and when a new process answers.
    """

    def __init__(
        self,
        servers: Sequence[ServerProcess],
        every: float,
        rng: random.Random,
        before: Callable[[ServerProcess], None] = lambda server: None,
        after: Callable[[ServerProcess], None] = lambda server: None,
    ):
        self.windows: list[Window] = []
        self.failed_starts: list[str] = []
        """Ends of logs of servers that did not come up again at once."""
        self._servers = list(servers)
        self._every = every
        self._rng = rng
        self._before, self._after = before, after

    @property
    def active(self) -> bool:
        """Whether a server is away now."""
        return bool(self.windows) and self.windows[-1].end is None

    @property
    def last_end(self) -> float:
        """When the last one was over; now where it is not; 0 where there was none."""
        return (self.windows[-1].end or time.time()) if self.windows else 0.0

    async def run(self, kinds: Sequence[str], until: float) -> None:
        """Faults of some kinds of FAULTS until `until` (Unix seconds); returns when every server
        is back.

        Raises:
            ServerError: a server did not come back.
        """
        if not kinds:
            return
        deck: list[tuple[str, ServerProcess]] = []
        while True:
            pause = self._rng.uniform(0.5, 1.5) * self._every
            if time.time() + pause >= until:
                return
            await asyncio.sleep(pause)
            if not deck:  # every fault meets every server before one comes again
                deck = [(kind, server) for kind in kinds for server in self._servers]
                self._rng.shuffle(deck)
            await self._one(*deck.pop())

    async def _one(self, kind: str, server: ServerProcess) -> None:
        self._before(server)
        window = Window(kind, server.name, time.time())
        self.windows.append(window)
        if kind == STOP:
            server.kill(signal.SIGSTOP)
            try:
                await asyncio.sleep(self._rng.uniform(*STOP_SECONDS))
            finally:
                server.kill(signal.SIGCONT)
        else:
            if kind == KILL:
                server.kill()
            began = time.time()
            await asyncio.to_thread(server.stop, 60)
            window.note = f"gone after {time.time() - began:.1f} s"
            await asyncio.sleep(DEAD_SECONDS)
            await self._restart(server)
        window.end = time.time()
        if kind != STOP:
            self._after(server)

    async def _restart(self, server: ServerProcess) -> None:
        for _ in range(RESTARTS):
            server.start()
            try:
                await ready([server], START_TIMEOUT)
                return
            except ServerError as error:
                self.failed_starts.append(str(error))
                await asyncio.to_thread(server.stop)
        raise ServerError(f"{server.name} did not come back in {RESTARTS} starts")
