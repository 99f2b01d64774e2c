# SPDX-License-Identifier: Apache-2.0
"""Whatever ends a request: stop tokens and strings, limits, the end of the context."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .registry import case, same, tokens

if TYPE_CHECKING:
    from ..harness import Harness


@case
def stop_token_in_right_drafts(h: Harness) -> None:
    ids = list(h.reference("A").token_ids)
    at = next(i for i in range(4, 30) if ids[i] not in ids[:i])
    for params in ({}, {"logprobs": 0}):
        reference = h.reference("A", stop_token_ids=[ids[at]], **params)
        assert len(reference.token_ids) == at + 1
        name = h.lynx("A", residual=40, bits=8, stop_token_ids=[ids[at]], **params)
        h.force(ids[: at + 1])
        same(h.run()[name], reference)
        assert h.verified()["accepted"] <= at + 1
        h.settle()


@case
def stop_token_in_wrong_drafts(h: Harness) -> None:
    ids = list(h.reference("A").token_ids)
    stops = [token for token in range(512) if token not in ids]
    name = h.lynx("A", residual=30, bits=2, stop_token_ids=stops)
    assert tokens(h.run()[name]) == ids
    assert [event["why"] for event in h.events("paused")] == ["eos"]


@case
def end_of_sequence_drafted(h: Harness) -> None:
    reference = h.reference("B", max_tokens=60, ignore_eos=False)
    name = h.lynx("B", residual=60, max_tokens=60, ignore_eos=False)
    same(h.run()[name], reference)


@case
def stop_string(h: Harness) -> None:
    text = h.reference("A").text
    stop = next(text[i : i + 2] for i in range(5, len(text)) if text[i : i + 2].isascii())
    reference = h.reference("A", stop=[stop])
    assert reference.finish_reason == "stop"
    name = h.lynx("A", residual=30, bits=8, stop=[stop])
    same(h.run()[name], reference)


@case
def few_tokens_wanted(h: Harness) -> None:
    for most in (1, 2, 10):
        for params in ({}, {"logprobs": 0}):
            reference = h.reference("A", max_tokens=most, **params)
            name = h.lynx("A", residual=25, bits=8, max_tokens=most, **params)
            same(h.run()[name], reference)
            assert h.verified()["drafted"] == most - 1
            assert [event["why"] for event in h.events("paused")] == ["max_tokens"]
            h.settle()


@case
def draft_limit(h: Harness) -> None:
    reference = h.reference("A", max_tokens=72)
    name = h.lynx("A", residual=90, bits=8, max_tokens=72)
    same(h.run()[name], reference)
    assert h.verified()["drafted"] == h.port.draft_limit
    (paused,) = h.events("paused")
    assert (paused["why"], paused["drafts"]) == ("limit", h.port.draft_limit)


@case
def one_token_prompt(h: Harness) -> None:
    """vLLM recomputes the last prompt token, here the whole prompt: nothing is left to load."""
    reference = h.reference("ONE")
    for residual in (2, 12):
        name = h.lynx("ONE", residual=residual, bits=2)
        same(h.run()[name], reference)
        h.settle()


@case
def context_ends(h: Harness) -> None:
    h.prompts["LONG"] = (h.prompts["A"] * 6)[:505]
    reference = h.reference("LONG", max_tokens=100)
    assert len(reference.token_ids) == 7
    for residual in (6, 30):
        name = h.lynx("LONG", residual=residual, max_tokens=100)
        same(h.run()[name], reference)
        h.settle()
    name = h.lynx("LONG", residual=30, max_tokens=100)
    h.run()
    assert [event["why"] for event in h.events("paused")] == ["no_room"]
