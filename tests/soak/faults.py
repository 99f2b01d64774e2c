# SPDX-License-Identifier: Apache-2.0
"""Servers that die, hang and are told to go, at times that the seed decides, and come back."""

import asyncio
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass

from lynx_connector.testbed.process import ServerError, ServerProcess
from tests.soak.servers import ready

KILL, STOP, TERM = "kill", "stop", "term"
DIED = "died"
"""Of a window: nobody did anything to that server."""
ROLL = "roll"
"""Of a window: the server was restarted behind a router that knew."""
GRACE_SECONDS = 60
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
    there are two. Servers that die by themselves are started again, too, as anybody's would be.

    Args:
        servers: what faults may meet.
        others: what is only looked after.
        every: seconds between the end of one fault and the start of the next, on average.
    """

    def __init__(
        self,
        servers: Sequence[ServerProcess],
        others: Sequence[ServerProcess],
        every: float,
        rng: random.Random,
    ):
        self.windows: list[Window] = []
        self.failed_starts: list[str] = []
        """Ends of logs of servers that did not come up again at once."""
        self.died: list[str] = []
        """Ends of logs of servers that died by themselves."""
        self._servers = list(servers)
        self._others = list(others)
        self._every = every
        self._rng = rng
        self._away: set[str] = set()

    @property
    def last_end(self) -> float:
        """When the last one was over; now where one is not; 0 where there was none."""
        return max((window.end or time.time() for window in self.windows), default=0.0)

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

    async def look_after(self) -> None:
        """Start again, until cancelled, what dies by itself.

        Raises:
            ServerError: a server did not come back.
        """
        while True:
            for server in [*self._servers, *self._others]:
                if server.running or server.name in self._away:
                    continue
                self.died.append(f"{server.name} at {time.time():.0f}\n{server.tail(40)}")
                window = Window(DIED, server.name, time.time())
                self.windows.append(window)
                await asyncio.to_thread(server.stop)  # what is left of its group
                await self._restart(server)
                window.end = time.time()
            await asyncio.sleep(1.0)

    async def roll(self, server: ServerProcess) -> None:
        """Tell a server to go, wait for its end, and start it again.

        Raises:
            ServerError: it did not come back.
        """
        await self._replace(server, Window(ROLL, server.name, time.time()))

    async def _one(self, kind: str, server: ServerProcess) -> None:
        if not server.running:
            return  # it has died by itself, and is being looked after
        window = Window(kind, server.name, time.time())
        if kind != STOP:
            await self._replace(server, window)
            return
        self.windows.append(window)
        server.kill(signal.SIGSTOP)
        try:
            await asyncio.sleep(self._rng.uniform(*STOP_SECONDS))
        finally:
            server.kill(signal.SIGCONT)
        window.end = time.time()

    async def _replace(self, server: ServerProcess, window: Window) -> None:
        self._away.add(server.name)
        self.windows.append(window)
        if window.what == KILL:
            server.kill()
        began = time.time()
        await asyncio.to_thread(server.stop, GRACE_SECONDS)
        window.note = f"gone after {time.time() - began:.1f} s"
        await asyncio.sleep(DEAD_SECONDS)
        await self._restart(server)
        window.end = time.time()
        self._away.discard(server.name)

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
