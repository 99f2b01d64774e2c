# SPDX-License-Identifier: Apache-2.0
"""The benchmark: link, servers, measurements, one after the other."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from lynx_connector.bench.e2e.cells import (
    QUICK,
    Block,
    Cell,
    interleaved,
    ordered,
    quick_modes,
)
from lynx_connector.bench.e2e.measure import Meter
from lynx_connector.bench.e2e.modes import NIXL, Mode, select_modes, split_by_memory
from lynx_connector.bench.e2e.prompts import Prompts
from lynx_connector.bench.e2e.rows import OUTPUT_TOKENS, Row, cell_of, summary
from lynx_connector.bench.e2e.servers import Fleet, ServerOptions
from lynx_connector.bench.errors import BenchError
from lynx_connector.testbed.launch import is_cpu_build
from lynx_connector.testbed.link import Link, loopback, open_link, set_rate
from lynx_connector.testbed.model import ensure_model, kv_elements_per_token

_START_SECONDS_PER_SERVER = 90.0
_WARM_UP_TOKENS = 600
TEXTS = 8
"""Different texts that repeats go through."""
_BLOCK_TOKENS = 128
_BYTES_PER_ELEMENT = {"float32": 4}
Step = tuple[Cell, Mode]


@dataclass(frozen=True)
class Options:
    """What a user can choose."""

    logs: Path
    model: str | None = None
    """Folder or hub name; default: the demo's small one."""
    dtype: str = "bfloat16"
    modes: Sequence[str] = ()
    block: Block = field(default_factory=Block)
    quick: bool = False
    namespaces: bool = True


class Bench:
    """One run. `rows` and `notes` hold what there is so far, also after an error.

    What `rows` holds before `run` is not measured again.

    Args:
        options: what to measure.
        say: gets a line for people.
        step: called after each measurement with what it was, done so far and all.
    """

    def __init__(
        self, options: Options, say: Callable[[str], None], step: Callable[[str, int, int], None]
    ):
        self._options = options
        self._say = say
        self._step = step
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self._done = 0
        options.block.check()
        self._modes = quick_modes() if options.quick else select_modes(options.modes)
        self._cells = ordered(QUICK if options.quick else [options.block])
        if not is_cpu_build():
            raise BenchError("lynx bench e2e drives CPU servers; the vLLM here is a GPU build")
        needs_nixl = any(mode.connector == NIXL for mode in self._modes)
        if needs_nixl and importlib.util.find_spec("nixl") is None:
            raise BenchError(
                "mode nixl needs the package nixl: pip install 'lynx-connector[bench]', or "
                "choose other modes with --mode"
            )
        self.model = options.model or str(ensure_model(say))
        self._longest = max(cell.prompt_tokens for cell in self._cells)
        self._prompts = Prompts(self.model, self._longest)
        self._texts = {number for cell in self._cells for number in _text_numbers(cell)}
        for number in self._texts:
            self._prompts.get(number, self._longest)

    def run(self, save: Callable[[Sequence[Row]], None]) -> None:
        """Measure everything; `save` gets all rows after each measurement.

        Raises:
            BenchError, LinkError, ModelError, RequestError, ServerError: see there.
        """
        self._options.logs.mkdir(parents=True, exist_ok=True)
        for old in [*self._options.logs.glob("*.log"), *self._options.logs.glob("events-*.jsonl")]:
            old.unlink()
        if self._options.namespaces:
            with open_link(0) as link:
                self._on(link, save)
        else:
            self._on(loopback(0), save)

    def _on(self, link: Link, save: Callable[[Sequence[Row]], None]) -> None:
        self._say(f"link: {link.note}")
        modes = self._modes
        if link.kind != "netns":
            modes = [mode for mode in modes if mode.is_lynx]
            self._note(
                "no network namespaces: Lynx modes only, the rate kept by their sender; wire bytes "
                "are their payload"
            )
            if not modes:
                raise BenchError(f"none of the chosen modes can be measured: {link.note}")
        known = {cell_of(row) for row in self.rows}
        missing = [
            (cell, mode)
            for cell, mode in interleaved(self._cells, modes)
            if (mode.name, cell) not in known
        ]
        if not missing:
            self._say("nothing is left to measure")
            return
        modes = [mode for mode in modes if mode in [one for _, one in missing]]
        options = self._server_options()
        groups = split_by_memory(modes, options.server_bytes, psutil.virtual_memory().available)
        if len(groups) > 1:
            names = "; ".join(", ".join(mode.name for mode in group) for group in groups)
            self._note(f"memory holds not all servers at once, so modes ran in groups: {names}")
        for group in groups:
            steps = [(cell, mode) for cell, mode in missing if mode in group]
            for own_link, own_steps in _by_link(link, steps):
                with Fleet(group, own_link, options) as fleet:
                    self._say(f"starting servers for {', '.join(mode.name for mode in group)}")
                    fleet.start(
                        _START_SECONDS_PER_SERVER * (1 + len(group)),
                        lambda ready, servers: self._step(
                            f"{ready} of {servers} servers ready", self._done, len(missing)
                        ),
                    )
                    for rows in self._measure(fleet, own_link, group, own_steps):
                        self.rows += rows
                        save(self.rows)
                        self._done += 1
                        self._step(summary(rows), self._done, len(missing))

    def _measure(
        self, fleet: Fleet, link: Link, modes: Sequence[Mode], steps: Sequence[Step]
    ) -> Iterator[list[Row]]:
        meter = Meter(fleet, link)
        for mode in modes:
            meter.warm_up(mode, self._prompts.get(0, _WARM_UP_TOKENS)[::-1])
        rate: float | None = None
        for cell, mode in steps:
            if link.kind == "netns" and rate != cell.link_mbit:
                set_rate(link, cell.link_mbit)
                rate = cell.link_mbit
            prompts = [
                self._prompts.get(number, cell.prompt_tokens) for number in _text_numbers(cell)
            ]
            yield meter.measure(mode, cell, prompts)
        for name, codecs in meter.codecs.items():
            if len(codecs) > 1:  # tables were learned on the way
                told = ", ".join(f"{codec} {count}" for codec, count in codecs.items())
                self._note(f"{name}: requests by codec: {told}")

    def _server_options(self) -> ServerOptions:
        options = self._options
        most = max(
            cell.concurrency * (cell.prompt_tokens + OUTPUT_TOKENS + _BLOCK_TOKENS)
            for cell in self._cells
        )
        # Also the prompts that one request at a time goes through: they stay cached.
        kept = len({cell.repeat % TEXTS for cell in self._cells}) * (
            self._longest + 2 * _BLOCK_TOKENS
        )
        element = _BYTES_PER_ELEMENT.get(options.dtype, 2)
        kv_bytes = int(max(most, kept) * 1.1 * element * kv_elements_per_token(self.model))
        length = self._longest + OUTPUT_TOKENS + _BLOCK_TOKENS
        return ServerOptions(self.model, options.dtype, length, kv_bytes, options.logs)

    def _note(self, text: str) -> None:
        self.notes.append(text)
        self._say(text)


def _text_numbers(cell: Cell) -> list[int]:
    """Which texts a cell's requests ask about; one request at a time changes it by repeat."""
    if cell.concurrency == 1:
        return [cell.repeat % TEXTS]
    return list(range(cell.concurrency))


def _by_link(link: Link, steps: Sequence[Step]) -> Iterator[tuple[Link, list[Step]]]:
    """Steps that the same servers can measure: all of them where tc sets the rate."""
    if link.kind == "netns":
        yield link, list(steps)
        return
    for mbit in dict.fromkeys(cell.link_mbit for cell, _ in steps):
        yield loopback(mbit), [step for step in steps if step[0].link_mbit == mbit]
