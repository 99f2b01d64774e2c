# SPDX-License-Identifier: Apache-2.0
"""What speculative start must do, on every flavour: each case asserts on its own outputs, and the
harness asserts after each that no block, request or scheduler state is left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scheduler_harness import Harness


@dataclass(frozen=True)
class Case:
    run: Callable[[Harness], None]
    flavours: tuple[str, ...] = ("v1-sync", "v1-async", "v2-sync", "v2-async")

    def runs_on(self, flavour: str) -> bool:
        return flavour in self.flavours


CASES: dict[str, Case] = {}


def case(run: Callable[..., None] | None = None, **options: Any) -> Any:
    """Register a case under its function's name; `only` names the flavours it runs on."""

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


# ---- drafts and acceptance


def _sweep(prompt: str, bits: int) -> Callable[[Harness], None]:
    def run(h: Harness) -> None:
        reference = h.reference(prompt, max_tokens=72)
        for k in (0, 1, 5, 31, 64):
            residual = 2 + k + 2 * h.asynchronous + (8 if k == 64 else 0)
            name = h.lynx(prompt, residual=residual if k else 2, bits=bits, max_tokens=72)
            same(h.run()[name], reference)
            drafted = h.events("verified")[0]["drafted"] if h.events("verified") else 0
            assert abs(drafted - k) <= 3, (k, drafted)
            h.settle()

    return run


for _prompt, _bits in (("A", 8), ("A", 2), ("E", 3), ("F", 4), ("ONE", 8), ("D", 3)):
    CASES[f"k_sweep_{_prompt}_{_bits}bit"] = Case(
        _sweep(_prompt, _bits),
        ("v1-sync", "v1-async", "v2-sync", "v2-async")
        if (_prompt, _bits) in (("A", 8), ("F", 4))
        else ("v1-sync", "v1-async"),
    )


@case
def forced_acceptance(h: Harness) -> None:
    reference = h.reference("A")
    for right in (0, 1, 7, 8, 20, 99):
        drafts = list(reference.token_ids)
        if right < len(drafts):
            drafts[right] = (drafts[right] + 1) % 500
        for params in ({}, {"repetition_penalty": 1.0, "logprobs": 0}):
            h.force(drafts)
            name = h.lynx("A", residual=26, **params)
            assert tokens(h.run()[name]) == list(reference.token_ids)
            event = h.verified()
            assert event["drafted"] >= 20
            assert event["accepted"] == min(right, event["drafted"])
            if right < event["drafted"]:
                assert event["rejected_token"] == drafts[right]
            else:
                assert event["rejected_token"] is None
            h.settle()


@case
def greedy_takes_one_pass(h: Harness) -> None:
    name = h.lynx("A", bits=8)
    same(h.run()[name], h.reference("A")) if False else None
    assert [e["how"] for e in h.events("verify_started")] == ["one_pass"]
    assert h.verified()["steps"] == 1
