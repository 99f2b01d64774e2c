# SPDX-License-Identifier: Apache-2.0
"""How a case is registered, and how its outputs are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..harness import Harness


@dataclass(frozen=True)
class Case:
    """What to run, and the flavours that it runs on."""

    run: Callable[[Harness], None]
    flavours: tuple[str, ...] = ("v1-sync", "v1-async", "v2-sync", "v2-async")

    def runs_on(self, flavour: str) -> bool:
        return flavour in self.flavours


CASES: dict[str, Case] = {}


def case(run: Callable[..., None] | None = None, **options: Any) -> Any:
    """Register a case under its function's name; `flavours` names those it runs on."""

    def register(function: Callable[[Harness], None]) -> Callable[[Harness], None]:
        CASES[function.__name__] = Case(function, **options)
        return function

    return register if run is None else register(run)


def tokens(output: Any) -> list[int]:
    return list(output.outputs[0].token_ids)


def same(output: Any, reference: Any) -> None:
    """Equal tokens, text and finish."""
    got = output.outputs[0]
    assert list(got.token_ids) == list(reference.token_ids)
    assert got.text == reference.text
    assert (got.finish_reason, got.stop_reason) == (reference.finish_reason, reference.stop_reason)
