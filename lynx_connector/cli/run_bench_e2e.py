# SPDX-License-Identifier: Apache-2.0
"""`lynx bench e2e`: every mode on real servers, as tables, picture and JSON."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import httpx
import typer
from rich.console import Console
from rich.progress import Progress

from lynx_connector.bench.e2e.cells import QUICK_NOTE, Block
from lynx_connector.bench.e2e.goals import outcomes
from lynx_connector.bench.e2e.report import goals_table, machine_name, result_tables, save_png
from lynx_connector.bench.e2e.report_file import ReportFile
from lynx_connector.bench.e2e.runner import Bench, Options
from lynx_connector.bench.errors import BenchError
from lynx_connector.cli.terminal import progress_bar, report_console
from lynx_connector.testbed.client import RequestError
from lynx_connector.testbed.link import LinkError
from lynx_connector.testbed.model import ModelError
from lynx_connector.testbed.process import ServerError

_INTERRUPTED = 130


@dataclass(frozen=True)
class Chosen:
    """What a user picked; None where all values are meant."""

    modes: list[str] | None
    links: list[float] | None
    prompts: list[int] | None
    prefills: list[str] | None
    concurrencies: list[int] | None
    repeats: int | None

    def block(self) -> Block:
        """The combinations to measure."""
        picked = {k: v for k, v in asdict(self).items() if v is not None and k != "modes"}
        return Block(**picked)

    @property
    def anything(self) -> bool:
        """Whether there is any choice."""
        return any(value is not None for value in asdict(self).values())


def run(
    json_path: Path,
    png: Path | None,
    quick: bool,
    model: str | None,
    dtype: str,
    chosen: Chosen,
    logs: Path,
    namespaces: bool,
    resume: bool,
) -> None:
    """Measure and show. Exit status 2 for bad input, 1 where a server or request failed.

    The report is written after each measurement.
    """
    console = report_console(120)
    # A closed terminal and a plain kill clean up as Ctrl-C does.
    for name in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, _interrupt)
    bench, report, status = None, None, 0
    try:
        if quick and chosen.anything:
            raise BenchError("--quick has its own choice of modes, links and prompts")
        for file in filter(None, (json_path, png)):
            if not file.parent.is_dir():
                raise BenchError(f"{file}: no such folder")
        options = Options(logs, model, dtype, chosen.modes or (), chosen.block(), quick, namespaces)
        with progress_bar() as bar:
            say = _printer(bar.console)
            bench = Bench(options, say, _stepper(bar, say))
            report = ReportFile(json_path, machine_name(), Path(bench.model).name)
            if resume:
                bench.rows += report.load()
                say(f"{json_path}: {len(bench.rows)} rows of an earlier run are kept")
            bench.run(report.save)
    except BenchError as error:
        _tell(str(error))
        status = 2
    except (
        FileNotFoundError,
        LinkError,
        ModelError,
        OSError,
        RequestError,
        ServerError,
        httpx.HTTPError,
    ) as error:
        _tell(f"{error}\nlogs: {logs}")
        status = 1
    except KeyboardInterrupt:
        _tell("stopped; servers and link are removed")
        status = _INTERRUPTED
    if bench is not None and report is not None and bench.rows:
        _show(bench, report, console, png, QUICK_NOTE if quick else "")
    if status:
        raise typer.Exit(status)


def _printer(console: Console) -> Callable[[str], None]:
    return lambda line: console.print(line, highlight=False, soft_wrap=True)


def _stepper(bar: Progress, say: Callable[[str], None]) -> Callable[[str, int, int], None]:
    """Moves the bar; where a file takes its place, a line for each finished measurement."""
    task = bar.add_task("", total=None)
    said = 0

    def step(what: str, done: int, total: int) -> None:
        nonlocal said
        bar.update(task, completed=done, total=total, description=what)
        if not bar.console.is_terminal and done > said:
            say(f"{done}/{total} {what}")
            said = done

    return step


def _show(bench: Bench, report: ReportFile, console: Console, png: Path | None, note: str) -> None:
    title = f"{report.model} on {report.machine}"
    if png is not None:
        save_png(bench.rows, png, title)
    console.print(title, highlight=False, soft_wrap=True)
    console.print("Milliseconds after the prefill is complete: median (worst).\n")
    for table in result_tables(bench.rows):
        console.print(table)
    for line in filter(None, [note, *bench.notes]):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(goals_table(outcomes(bench.rows)))
    written = ", ".join(str(file) for file in (report.path, png) if file)
    console.print(f"written: {written}", highlight=False, soft_wrap=True)


def _tell(message: str) -> None:
    typer.secho(f"lynx bench e2e: {message}", fg="red", err=True)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
