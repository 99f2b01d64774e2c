# SPDX-License-Identifier: Apache-2.0
"""The soak: servers, reference answers, load with faults, rests, report."""

import argparse
import asyncio
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lynx_connector.testbed.process import ServerError
from tests.soak import faults as server_faults
from tests.soak import kinds, reference, report, transport_faults
from tests.soak.faults import ServerFaults
from tests.soak.load import Load
from tests.soak.rolling import roll
from tests.soak.servers import LEASE_SECONDS, TRANSFER_TIMEOUT_SECONDS, Fleet
from tests.soak.watch import Watch

WARM_UP_SECONDS = 20.0
SETTLE_SECONDS = LEASE_SECONDS + TRANSFER_TIMEOUT_SECONDS + 30.0
WANTED_A_MINUTE = 334
TELL_SECONDS = 30.0
MIN_FAULTS_SECONDS = 60.0
LONG_MINUTES = 15


@dataclass(frozen=True)
class Settings:
    """What a run is; equal settings ask the same things."""

    out: Path
    minutes: float = 30.0
    seed: int = 1
    prefills: int = 2
    decodes: int = 2
    clients: int = 10
    kinds: list[str] = field(default_factory=lambda: kinds.choose([], []))
    pool: int = 0
    """Different cases; 0: by the length of the run."""
    leave: float = 0.1
    server_faults: tuple[str, ...] = server_faults.FAULTS
    fault_every: float = 60.0
    transport_faults: tuple[str, ...] = transport_faults.FAULTS
    one_in: int = 16
    rolling: int = 99
    """Begin with a rolling restart of the roles that have two servers: at most so many of each."""
    events: bool = False
    rest_every: float = 300.0
    sample_every: float = 5.0
    start_timeout: float = 600.0
    wanted_a_minute: int = WANTED_A_MINUTE

    @property
    def cases(self) -> int:
        """Size of the pool."""
        return self.pool or max(int(40 * self.minutes), 4 * len(self.kinds))

    def faults_at(self, seconds: float) -> tuple[str, ...]:
        """Server faults after so much of the run. In a long one no server is restarted in the
        second half, which tells whether memory grows."""
        if self.minutes < LONG_MINUTES or seconds < self.minutes * 30:
            return self.server_faults
        return tuple(fault for fault in self.server_faults if fault == server_faults.STOP)


def soak(settings: Settings, say: Callable[[str], None] = print) -> dict[str, Any]:
    """One run; returns the report, which lies in `settings.out`, too.

    Raises:
        ServerError: servers did not start, or one did not come back.
    """
    settings.out.mkdir(parents=True, exist_ok=True)

    async def run() -> dict[str, Any]:
        work = asyncio.ensure_future(_Soak(settings, say).run())
        # As Ctrl-C: the report tells what was seen until then.
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, work.cancel)
        return await work

    return asyncio.run(run())


class _Soak:
    def __init__(self, settings: Settings, say: Callable[[str], None]):
        self._settings = settings
        self._say = say
        self._injecting = settings.out / "transport-faults.json"
        self._notes = self._injecting.with_suffix(".jsonl")
        self._notes.unlink(missing_ok=True)
        report.remove(settings.out)

    async def run(self) -> dict[str, Any]:
        settings = self._settings
        self._inject(False)
        fleet = Fleet(
            settings.out,
            settings.prefills,
            settings.decodes,
            adapters="lora" in settings.kinds,
            events=settings.events,
            settings=self._injecting,
        )
        cases = kinds.pool(settings.kinds, settings.seed, settings.cases)
        try:
            turns = await self._reference(fleet, cases)
            await fleet.start(settings.start_timeout)
            return await self._load(fleet, cases, turns)
        finally:
            fleet.stop()

    async def _reference(
        self, fleet: Fleet, cases: Sequence[kinds.Case]
    ) -> dict[str, list[reference.Turn]]:
        """Answers of the plain server, which is gone afterwards; kept for the next run."""
        kept = self._settings.out / "reference.json"
        if (turns := reference.load(kept, cases)) is not None:
            return turns
        self._say("reference server starts")
        await fleet.start_reference(self._settings.start_timeout)
        began = time.monotonic()
        turns = await reference.compute(cases, fleet.reference.url)
        self._say(f"{len(turns)} reference answers in {time.monotonic() - began:.0f} s")
        await asyncio.to_thread(fleet.reference.stop)
        reference.save(kept, cases, turns)
        return turns

    async def _load(
        self,
        fleet: Fleet,
        cases: Sequence[kinds.Case],
        turns: dict[str, list[reference.Turn]],
    ) -> dict[str, Any]:
        settings = self._settings
        watch = Watch([*fleet.engines, fleet.router])
        faults = ServerFaults(
            fleet.engines,
            [fleet.router],
            settings.fault_every,
            random.Random(f"faults-{settings.seed}"),
        )
        load = Load(
            fleet,
            cases,
            turns,
            clients=settings.clients,
            seed=settings.seed,
            leave=settings.leave,
            trouble=lambda: faults.last_end,
        )
        watching = asyncio.ensure_future(watch.run(settings.sample_every))
        care = asyncio.ensure_future(faults.look_after())
        telling = asyncio.ensure_future(self._tell(load))
        work = asyncio.ensure_future(self._phases(fleet, load, faults, watch))
        whole = False
        try:
            done, _ = await asyncio.wait([work, care], return_when=asyncio.FIRST_COMPLETED)
            done.pop().result()
            whole = True
        finally:
            for task in (watching, care, telling, work):
                task.cancel()
            await asyncio.wait([watching, care, telling, work])
            found = report.summary(
                {**asdict(settings), "out": settings.out.name},
                load.outcomes,
                faults.windows,
                watch,
                transport_faults.noted(self._injecting),
                faults.failed_starts,
                faults.died,
                int(settings.wanted_a_minute * settings.minutes),
                whole,
            )
            report.write(settings.out, found, load.outcomes)
        return found

    async def _tell(self, load: Load) -> None:
        """One line every `TELL_SECONDS`, until cancelled."""
        began = time.time()
        while True:
            await asyncio.sleep(TELL_SECONDS)
            self._say(self._progress(load, began))

    async def _phases(self, fleet: Fleet, load: Load, faults: ServerFaults, watch: Watch) -> None:
        """Warm up, rest, roll, then load with faults and rests until the time is over."""
        settings = self._settings
        self._say("warm-up")
        await load.run(time.time() + min(WARM_UP_SECONDS, settings.minutes * 10))
        await self._rest(watch)
        self._inject(True)
        began = time.time()
        if servers := fleet.replaceable(settings.rolling):
            self._say("rolling restart")
            await load.run_beside(roll(fleet, servers, load, faults, self._say))
        # However long that took, faults come, too.
        end = max(began + settings.minutes * 60, time.time() + MIN_FAULTS_SECONDS)
        while time.time() < end:
            pause = min(time.time() + settings.rest_every, end)
            kinds_now = settings.faults_at(time.time() - began)
            await asyncio.gather(load.run(pause), faults.run(kinds_now, pause - 10))
            if time.time() >= end:
                self._inject(False)
            await self._rest(watch)

    async def _rest(self, watch: Watch) -> None:
        rest = await watch.rest(SETTLE_SECONDS)
        self._say("at rest, nothing left" if not rest.left else f"at rest, left: {rest.left}")

    def _inject(self, on: bool) -> None:
        one_in = self._settings.one_in if on else 0
        transport_faults.write_settings(self._injecting, one_in, self._settings.transport_faults)

    def _progress(self, load: Load, began: float) -> str:
        counts = Counter(str(outcome.verdict) for outcome in load.outcomes)
        seconds = time.time() - began
        rate = len(load.outcomes) / seconds
        return f"{seconds:.0f} s, {rate:.1f} requests a second: {dict(counts)}"


def _names(value: str) -> list[str]:
    return [name for name in value.split(",") if name]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0 where every goal that was measured is met."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    add = parser.add_argument
    add("--minutes", type=float, default=30.0, help="of load, without starts (default 30)")
    add("--seed", type=int, default=1, help="of cases, clients and faults")
    add("--out", type=Path, help="folder for report, picture and logs (default: a new one)")
    add("--prefills", type=int, default=2)
    add("--decodes", type=int, default=2)
    add("--clients", type=int, default=10)
    add("--pool", type=int, default=0, help="different cases (default: 40 a minute)")
    add("--kinds", type=_names, default=[], help=f"of {','.join(kinds.KINDS)}")
    add("--without", type=_names, default=[], help="kinds to leave out")
    add("--leave", type=float, default=0.1, help="share of clients that do not wait")
    add(
        "--server-faults",
        type=_names,
        default=list(server_faults.FAULTS),
        help="of kill,stop,term; empty: none",
    )
    add("--fault-every", type=float, default=60.0, help="seconds between server faults")
    add(
        "--transport-faults",
        type=_names,
        default=list(transport_faults.FAULTS),
        help="of lost,flipped,cut,repeated,late; empty: none",
    )
    add("--one-in", type=int, default=16, help="frames of which one meets a transport fault")
    add("--rolling", type=int, default=99, help="servers of a role to restart in turn (all)")
    add("--events", action="store_true", help="keep every server's events, for `lynx trace`")
    given = parser.parse_args(arguments)
    try:
        chosen = kinds.choose(given.kinds, given.without)
    except ValueError as error:
        parser.error(str(error))
    settings = Settings(
        out=given.out or Path(tempfile.mkdtemp(prefix="lynx-soak-")),
        minutes=given.minutes,
        seed=given.seed,
        prefills=given.prefills,
        decodes=given.decodes,
        clients=given.clients,
        kinds=chosen,
        pool=given.pool,
        leave=given.leave,
        server_faults=tuple(given.server_faults),
        fault_every=given.fault_every,
        transport_faults=tuple(given.transport_faults),
        one_in=given.one_in,
        rolling=given.rolling,
        events=given.events,
    )
    print(f"kinds: {', '.join(chosen)}")
    for name in kinds.FAILING_TODAY:
        if name not in chosen:
            print(f"left out: {name} ({kinds.FAILING_TODAY[name]})")
    try:
        found = soak(settings, lambda line: print(line, flush=True))
    except (ServerError, KeyboardInterrupt, asyncio.CancelledError) as error:
        print(f"ended early: {error or type(error).__name__}")
        found = report.read(settings.out)
        if found is None:
            return 1
    print(report.text(found))
    print(f"report and picture: {settings.out / 'soak.json'}, {settings.out / 'soak.png'}")
    return 0 if all(goal["met"] is not False for goal in found["goals"]) else 1
