# SPDX-License-Identifier: Apache-2.0
"""The goals that the end-to-end benchmark is measured by, from the rows at hand."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lynx_connector.bench.e2e.rows import Row

_FOUR_K = range(3600, 4700)


@dataclass(frozen=True)
class Outcome:
    """One goal at one place."""

    goal: str
    where: str
    value: float
    limit: float

    @property
    def met(self) -> bool:
        """Whether the value is within the limit."""
        return self.value <= self.limit


def outcomes(rows: Sequence[Row]) -> list[Outcome]:
    """Every goal wherever both sides of its ratio were measured."""
    return [*_first_token(rows), *_cached(rows), *_cold(rows), *_many(rows), *_unlimited(rows)]


def link_name(mbit: float) -> str:
    """A link's rate for people."""
    return f"{mbit:g} Mbit/s" if mbit else "unlimited"


def _select(rows: Iterable[Row], **wanted: object) -> list[Row]:
    return [row for row in rows if all(getattr(row, k) == v for k, v in wanted.items())]


def _places(rows: Iterable[Row]) -> list[tuple[int, float]]:
    return sorted({(row.prompt_tokens, row.link_mbit) for row in rows})


def _tt32(rows: Iterable[Row]) -> float:
    return statistics.median(row.tt32_ms for row in rows)


def _where(prompt: int, link: float) -> str:
    return f"{prompt} tokens, {link_name(link)}"


def _first_token(rows: Sequence[Row]) -> Iterable[Outcome]:
    alone = _select(rows, mode="lynx", concurrency=1)
    for prefill in ("cached", "cold"):
        for prompt, link in _places(own := _select(alone, prefill=prefill)):
            here = _select(own, prompt_tokens=prompt, link_mbit=link)
            first = statistics.median(row.ttft_ms for row in here)
            step = statistics.median(row.decode_step_ms for row in here)
            where = f"{prefill}, {_where(prompt, link)}"
            yield Outcome("first token, in decode steps", where, first / step, 2.0)


def _ratio(
    rows: Sequence[Row], other: str, goal: str, limit: float, links: Iterable[float]
) -> Iterable[Outcome]:
    alone = _select(rows, concurrency=1, prefill="cached")
    for prompt, link in _places(alone):
        here = _select(alone, prompt_tokens=prompt, link_mbit=link)
        ours, theirs = _select(here, mode="lynx"), _select(here, mode=other)
        if ours and theirs and prompt in _FOUR_K and link in links:
            yield Outcome(goal, _where(prompt, link), _tt32(ours) / _tt32(theirs), limit)


def _cached(rows: Sequence[Row]) -> Iterable[Outcome]:
    links = [link for link in {row.link_mbit for row in rows} if 100 <= link <= 200]
    yield from _ratio(rows, "nixl", "token 32, cached, / NIXL", 0.40, links)
    yield from _ratio(rows, "lynx-int8", "token 32, cached, / blocking INT8", 0.70, links)


def _unlimited(rows: Sequence[Row]) -> Iterable[Outcome]:
    yield from _ratio(rows, "nixl", "token 32, link unlimited, / NIXL", 1.05, [0])


def _cold(rows: Sequence[Row]) -> Iterable[Outcome]:
    """Against a single server that holds the cache already: what a user would have at best."""
    alone = _select(rows, concurrency=1)
    ours = _select(alone, mode="lynx", prefill="cold")
    for prompt, link in _places(ours):
        single = _select(alone, mode="single", prefill="cached", prompt_tokens=prompt)
        if single and prompt >= _FOUR_K.start:
            here = _tt32(_select(ours, prompt_tokens=prompt, link_mbit=link))
            goal = "token 32, cold, / single server with the cache"
            yield Outcome(goal, _where(prompt, link), here / _tt32(single), 1.15)


def _many(rows: Sequence[Row]) -> Iterable[Outcome]:
    together = [row for row in rows if row.concurrency >= 8 and row.link_mbit]
    for prefill, (prompt, link) in itertools.product(("cold", "cached"), _places(together)):
        here = _select(together, prefill=prefill, prompt_tokens=prompt, link_mbit=link)
        ours, theirs = _select(here, mode="lynx"), _select(here, mode="nixl")
        if ours and theirs:
            goal = "token 32, 8 at once, worst, / NIXL"
            where = f"{prefill}, {_where(prompt, link)}"
            yield Outcome(goal, where, _worst(ours) / _worst(theirs), 0.50)


def _worst(rows: Sequence[Row]) -> float:
    """The worst request of each repeat; the median of those."""
    repeats = {row.repeat for row in rows}
    return statistics.median(
        max(row.tt32_ms for row in rows if row.repeat == repeat) for repeat in repeats
    )
