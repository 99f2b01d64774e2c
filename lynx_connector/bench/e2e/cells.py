# SPDX-License-Identifier: Apache-2.0
"""Which combinations are measured, and in which order."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from lynx_connector.bench.e2e.modes import MODES, Mode
from lynx_connector.bench.errors import BenchError

PREFILLS = ("cold", "cached")
LINKS_MBIT = (100.0, 200.0, 400.0, 1000.0, 0.0)
#: Whole blocks of 128 tokens, vLLM's block size on CPU, and one token more: a prefix hit then
#: leaves a single token to compute.
PROMPT_TOKENS = (1025, 4097, 7169)
CONCURRENCIES = (1, 8)
REPEATS = 3


@dataclass(frozen=True)
class Cell:
    """One measurement of one mode: `concurrency` requests at a time."""

    link_mbit: float
    """0: unlimited."""
    prompt_tokens: int
    prefill: str
    """`cold`, or `cached`: the prompt is in the prefill's prefix cache."""
    concurrency: int
    repeat: int


@dataclass(frozen=True)
class Block:
    """A full product of values."""

    links: Sequence[float] = LINKS_MBIT
    prompts: Sequence[int] = PROMPT_TOKENS
    prefills: Sequence[str] = PREFILLS
    concurrencies: Sequence[int] = CONCURRENCIES
    repeats: int = REPEATS

    def check(self) -> None:
        """Raises BenchError for a value that cannot be measured."""
        for option, values, least in (
            ("--link-mbit", self.links, 0),
            ("--prompt-tokens", self.prompts, 256),
            ("--concurrency", self.concurrencies, 1),
            ("--repeats", [self.repeats], 1),
        ):
            for value in values:
                if value < least:
                    raise BenchError(f"{option} {value:g}: at least {least}")
        for prefill in self.prefills:
            if prefill not in PREFILLS:
                raise BenchError(f"--prefill {prefill}: accepted values are {', '.join(PREFILLS)}")

    def cells(self) -> list[Cell]:
        """Every combination."""
        values = (self.links, self.prompts, self.prefills, self.concurrencies)
        product = itertools.product(*values, range(self.repeats))
        return [Cell(*combination) for combination in product]


QUICK_MODES = ("single", "nixl", "lynx", "lynx-int8")
QUICK = (
    Block([200.0], [4097], ["cold"], [1], 1),
    Block([100.0, 200.0, 0.0], [4097], ["cached"], [1], 2),
    Block([200.0], [1025], ["cached"], [8], 1),
)
"""What the goals speak of, less the longest prompts, as far as five minutes go."""
QUICK_NOTE = (
    "quick: modes single, nixl, lynx and lynx-int8; 4k tokens cold at 200 Mbit/s (once), 4k tokens "
    "prefix-cached at 100, 200 Mbit/s and unlimited (twice), 8 requests of 1k tokens at 200 Mbit/s"
)


def ordered(blocks: Sequence[Block]) -> list[Cell]:
    """The cells of all blocks: same prompts together, cold before cached, repeats around links.

    A cold prefill leaves behind what the cached ones need, and every repeat goes through all links
    and, inside each, all modes: what the machine does at the side meets all of them alike.
    """
    cells = dict.fromkeys(cell for block in blocks for cell in block.cells())
    return sorted(
        cells,
        key=lambda cell: (
            cell.concurrency,
            cell.prompt_tokens,
            PREFILLS.index(cell.prefill),
            cell.repeat,
            cell.link_mbit or float("inf"),
        ),
    )


def interleaved(cells: Sequence[Cell], modes: Sequence[Mode]) -> list[tuple[Cell, Mode]]:
    """Every cell with every mode. The mode that comes first changes from repeat to repeat."""
    steps = []
    for cell in cells:
        first = cell.repeat % max(len(modes), 1)
        steps += [(cell, mode) for mode in [*modes[first:], *modes[:first]]]
    return steps


def quick_modes() -> list[Mode]:
    """The modes of `--quick`."""
    return [MODES[name] for name in QUICK_MODES]
