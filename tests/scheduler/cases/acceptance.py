# SPDX-License-Identifier: Apache-2.0
"""How many drafts there are, how many are right, and in which way they are verified."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .registry import CASES, Case, case, same, tokens

if TYPE_CHECKING:
    from ..harness import Harness


def _sweep(prompt: str, bits: int) -> Callable[[Harness], None]:
    def run(h: Harness) -> None:
        most = 36 if h.v2 else 72
        reference = h.reference(prompt, max_tokens=most)
        for k in (0, 1, 5, 31) if h.v2 else (0, 1, 5, 31, 64):
            residual = 2 + k + 2 * h.asynchronous + (8 if k == 64 else 0)
            name = h.lynx(prompt, residual=residual if k else 2, bits=bits, max_tokens=most)
            same(h.run()[name], reference)
            drafted = h.events("verified")[0]["drafted"] if h.events("verified") else 0
            assert abs(drafted - k) <= 3, (k, drafted)
            h.settle()

    return run


for _prompt, _bits in (("A", 8), ("A", 2), ("E", 3), ("F", 4), ("ONE", 8), ("D", 3)):
    CASES[f"k_sweep_{_prompt}_{_bits}bit"] = Case(
        _sweep(_prompt, _bits),
        ("v1-sync", "v1-async", "v2-sync", "v2-async")
        if (_prompt, _bits) == ("F", 4)
        else ("v1-sync", "v1-async"),
    )


@case
def forced_acceptance(h: Harness) -> None:
    reference = h.reference("A")
    for right in (0, 7, 99) if h.v2 else (0, 1, 7, 8, 20, 99):
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
    reference = h.reference("A")
    name = h.lynx("A", bits=8)
    same(h.run()[name], reference)
    assert [event["how"] for event in h.events("verify_started")] == ["one_pass"]
    assert h.verified()["steps"] == 1
    assert h.verified()["accepted"] > 5


@case
def rows_take_groups(h: Harness) -> None:
    """17 drafts and more, with 8 request slots in all, of which some are taken."""
    reference = h.reference("A", logprobs=0)
    others = {p: h.reference(p) for p in ("B", "C", "D", "E")}
    name = h.lynx("A", residual=22, logprobs=0)
    names = {h.add(p): p for p in others}
    h.force(list(reference.token_ids))
    outputs = h.run()
    same(outputs[name], reference)
    for other, prompt in names.items():
        same(outputs[other], others[prompt])
    event = h.verified()
    assert event["accepted"] == event["drafted"] >= 17
    assert event["steps"] >= 3
    assert [started["how"] for started in h.events("verify_started")] == ["rows"]


@case
def a_mismatch_saves_the_remaining_groups(h: Harness) -> None:
    reference = h.reference("A", logprobs=0)
    name = h.lynx("A", residual=40, logprobs=0)
    h.force([(reference.token_ids[0] + 1) % 500] * 64)
    same(h.run()[name], reference)
    assert h.verified()["steps"] == 1
    assert h.verified()["accepted"] == 0
