# SPDX-License-Identifier: Apache-2.0
"""Clients that draw cases from a pool, wait for answers, or leave."""

import asyncio
import random
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from lynx_connector.testbed.process import ServerProcess
from tests.integration.pair import PREFILL_LEG
from tests.soak.client import Answer, RequestError, ask, new_client
from tests.soak.kinds import Case, Compare, Route
from tests.soak.reference import Turn, Verdict, judge
from tests.soak.servers import Fleet

BOUND_SECONDS = 60.0
"""Longest wait for an answer while every server runs, and after the last one was back."""
SECONDS_A_TOKEN = 0.2
PATIENCE = 0.5
"""Mean seconds after which a client leaves that does."""
BACK_OFF_SECONDS = 0.5
PAUSE_SECONDS = 0.8
"""Mean time from an answer to the next request: servers that start need the machine, too."""
ROLLING_PAUSE_SECONDS = 2.0


@dataclass
class Outcome:
    """What became of one request. Times are Unix seconds."""

    kind: str
    name: str
    verdict: Verdict
    start: float
    end: float
    detail: str = ""
    status: int = 0


class Load:
    """Clients of one deployment.

    Args:
        turns: by the cases' names, what is asked and expected (`reference.compute`).
        trouble: when the last server fault was over (Unix seconds; now while one lasts).
        leave: share of requests whose client leaves.
    """

    def __init__(
        self,
        fleet: Fleet,
        cases: Sequence[Case],
        turns: Mapping[str, list[Turn]],
        *,
        clients: int,
        seed: int,
        leave: float,
        trouble: Callable[[], float] = lambda: 0.0,
    ):
        self.outcomes: list[Outcome] = []
        self.router = fleet.router
        """Where requests go from now on."""
        self._open: set[asyncio.Future[Any]] = set()
        self._fleet = fleet
        self._cases = cases
        self._turns = turns
        self._rngs = [random.Random(f"client-{seed}-{index}") for index in range(clients)]
        self._leave = leave
        self._trouble = trouble

    async def run(self, until: float) -> None:
        """Ask until `until` (Unix seconds), then wait for what is open."""
        await self._run(self._cases, PAUSE_SECONDS, lambda: time.time() < until)

    async def run_beside(self, work: Coroutine[Any, Any, None]) -> None:
        """Ask through the router only until `work` is done, then wait for what is open."""
        working = asyncio.ensure_future(work)
        routed = [case for case in self._cases if case.route is Route.ROUTER]
        try:
            await self._run(routed, ROLLING_PAUSE_SECONDS, lambda: not working.done())
        finally:
            working.cancel()
            await asyncio.wait([working])
        working.result()

    async def answered(self) -> None:
        """Wait until all that is open now has ended."""
        if self._open:
            await asyncio.wait(set(self._open))

    async def _run(self, cases: Sequence[Case], pause: float, go_on: Callable[[], bool]) -> None:
        async with new_client(4 * len(self._rngs)) as http, asyncio.TaskGroup() as clients:
            for rng in self._rngs:
                clients.create_task(self._client(http, rng, cases, pause, go_on))

    async def _client(
        self,
        http: httpx.AsyncClient,
        rng: random.Random,
        cases: Sequence[Case],
        pause: float,
        go_on: Callable[[], bool],
    ) -> None:
        while go_on():
            await asyncio.sleep(rng.expovariate(1 / pause))
            case = rng.choice(cases)
            for turn in self._turns[case.name]:
                outcome = await self._one(http, rng, case, turn)
                self.outcomes.append(outcome)
                if outcome.verdict in (Verdict.FAILED, Verdict.NEVER):
                    await asyncio.sleep(BACK_OFF_SECONDS * rng.uniform(0.5, 1.5))
                if outcome.verdict not in (Verdict.EQUAL, Verdict.NEAR_TIE):
                    break

    async def _one(
        self, http: httpx.AsyncClient, rng: random.Random, case: Case, turn: Turn
    ) -> Outcome:
        start = time.time()
        leaves = rng.expovariate(1 / PATIENCE) if rng.random() < self._leave else None
        asking = asyncio.ensure_future(self._send(http, rng, case, turn))
        self._open.add(asking)
        asking.add_done_callback(self._open.discard)
        verdict, detail, status = Verdict.NEVER, "", 0
        try:
            if leaves is not None:
                await asyncio.wait([asking], timeout=leaves)
                verdict = Verdict.LEFT
            else:
                bound = BOUND_SECONDS + SECONDS_A_TOKEN * turn.body.get("max_tokens", 0)
                await self._wait(asking, start, bound)
            if asking.done():
                verdict, detail, status = self._judge(case, turn, asking)
        finally:
            asking.cancel()
            await asyncio.wait([asking])
            _ = asking.cancelled() or asking.exception()  # retrieved
        return Outcome(case.kind, case.name, verdict, start, time.time(), detail, status)

    async def _wait(self, asking: "asyncio.Future[Any]", start: float, bound: float) -> None:
        while not asking.done():
            left = max(start, self._trouble()) + bound - time.time()
            if left <= 0:
                return
            await asyncio.wait([asking], timeout=min(left, 5.0))

    @staticmethod
    def _judge(
        case: Case, turn: Turn, asking: "asyncio.Future[list[Answer]]"
    ) -> tuple[Verdict, str, int]:
        error = asking.exception()
        if isinstance(error, RequestError):
            if case.compare is Compare.REFUSED and error.status == 400:
                return Verdict.REFUSED, "", error.status
            return Verdict.FAILED, str(error), error.status
        if error is not None:
            raise error
        verdicts = [judge(case, turn, answer) for answer in asking.result()]
        for verdict, detail in verdicts:
            if verdict is not Verdict.EQUAL:
                return verdict, detail, 200
        return Verdict.EQUAL, "", 200

    async def _send(
        self, http: httpx.AsyncClient, rng: random.Random, case: Case, turn: Turn
    ) -> list[Answer]:
        """Every answer that has to be held against the turn."""
        path, body = case.path, turn.body
        if case.route is Route.ROUTER:
            return [await ask(http, self.router.url, path, body, case.stream)]
        decode = rng.choice(self._fleet.decodes).url
        if case.route is Route.PLAIN:
            return [await ask(http, decode, path, body, case.stream)]
        leg = await self._prefill(http, rng.choice(self._fleet.prefills), case, turn)
        if case.route is Route.ORPHAN:
            return [leg]
        both = body | {"kv_transfer_params": leg.kv_transfer_params}
        return list(await asyncio.gather(*(ask(http, decode, path, both) for _ in range(2))))

    @staticmethod
    async def _prefill(
        http: httpx.AsyncClient, prefill: ServerProcess, case: Case, turn: Turn
    ) -> Answer:
        leg = turn.body | {"max_tokens": 1, "min_tokens": 1, "kv_transfer_params": PREFILL_LEG}
        answer = await ask(http, prefill.url, case.path, leg)
        if answer.kv_transfer_params is None:
            raise RequestError(200, "a prefill leg without kv_transfer_params")
        return answer
