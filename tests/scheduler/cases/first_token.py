# SPDX-License-Identifier: Apache-2.0
"""The prefill's own token, emitted before any KV."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .registry import case, same, tokens

if TYPE_CHECKING:
    from ..harness import Harness


def _check(h: Harness, prompt: str, *, transfer: dict[str, Any], **params: Any) -> Any:
    """A request with its first token handed over equals an ordinary one; its last output."""
    reference = h.reference(prompt, **params)
    name = h.lynx(prompt, first=reference.token_ids[0], **transfer, **params)
    output = h.run()[name]
    same(output, reference)
    assert len(h.events("first_token")) == 1
    return output


@case
def first_token_comes_before_any_kv(h: Harness) -> None:
    for residual in (12, 30):
        reference = h.reference("A")
        first = reference.token_ids[0]
        name = h.lynx("A", anchor=9, residual=residual, first=first)
        outputs: list[list[int]] = []
        for _ in range(8):
            outputs += [tokens(output) for output in h.step()]
        assert outputs == [[first]], "one output, in a step before the anchor"
        same(h.run()[name], reference)
        assert h.verified()["drafted"] > 0
        h.settle()


@case
def first_token_with_every_number_of_drafts(h: Harness) -> None:
    for prompt, bits in (("F", 8), ("F", 2), ("D", 3)):
        for residual in (2, 3, 4, 5, 9, 34):
            for delay in (0, 1):
                if h.v2 and (residual > 5 or delay):
                    continue
                _check(
                    h, prompt, transfer={"bits": bits, "residual": residual, "first_delay": delay}
                )
                h.settle()


@case
def first_token_then_forced_acceptance(h: Harness) -> None:
    reference = h.reference("A")
    ids = list(reference.token_ids)
    for right in (0, 3, 99):
        drafts = ids[1:]
        if right < len(drafts):
            drafts[right] = (drafts[right] + 1) % 500
        for params in ({}, {"min_tokens": 5}):  # in one pass, by rows
            h.force(drafts)
            name = h.lynx("A", residual=22, first=ids[0], **params)
            assert tokens(h.run()[name]) == ids
            event = h.verified()
            assert event["accepted"] == min(right, event["drafted"])
            h.settle()


@case
def first_token_and_rows(h: Harness) -> None:
    ids = h.reference("B").token_ids
    for params in (
        {"repetition_penalty": 1.3},
        {"logit_bias": {ids[0]: -20.0}},
        {"min_tokens": 8, "stop_token_ids": [ids[2], ids[9]]},
    ):
        for residual in (5, 20):
            _check(h, "B", transfer={"residual": residual}, **params)
            assert [event["how"] for event in h.events("verify_started")] == ["rows"]
            h.settle()


@case(flavours=("v2-sync", "v2-async"))
def first_token_and_what_only_v2_tells_apart(h: Harness) -> None:
    for params in ({"presence_penalty": 1.0}, {"temperature": 0.8, "seed": 7}):
        _check(h, "A", transfer={"residual": 16, "bits": 8}, **params)
        h.settle()


@case
def first_token_and_a_rewind(h: Harness) -> None:
    h.scheduler._verifier._opaque = True
    _check(h, "A", transfer={"residual": 16})
    assert [event["how"] for event in h.events("verify_started")] == ["rewind"]


@case
def first_token_ends_the_request(h: Harness) -> None:
    ids = h.reference("A").token_ids
    for params in ({"max_tokens": 1}, {"stop_token_ids": [ids[0]]}):
        for anchor in (1, 2, 6):
            for blocking in (False, True):
                transfer = {"anchor": anchor, "residual": 9, "blocking": blocking}
                output = _check(h, "A", transfer=transfer, **params)
                assert len(tokens(output)) == 1
                assert not h.events("drafting")
                h.settle()


@case
def first_token_meets_a_stop_string(h: Harness) -> None:
    stop = h.tokenizer.decode([h.reference("B").token_ids[0]])
    reference = h.reference("B", stop=[stop])
    assert len(reference.token_ids) == 1
    name = h.lynx("B", anchor=6, first=reference.token_ids[0], stop=[stop])
    same(h.run()[name], reference)


@case
def first_token_and_few_more(h: Harness) -> None:
    for most in (2, 3, 10):
        _check(h, "A", transfer={"residual": 25, "bits": 8}, max_tokens=most)
        assert h.verified()["drafted"] == most - 2
        assert [event["why"] for event in h.events("paused")] == ["max_tokens"]
        h.settle()


@case
def first_token_at_the_end_of_the_context(h: Harness) -> None:
    for length in (505, 510, 511):
        h.prompts[f"LONG{length}"] = (h.prompts["A"] * 6)[:length]
        for residual in (4, 30):
            _check(h, f"LONG{length}", transfer={"residual": residual}, max_tokens=100)
            h.settle()


@case
def first_token_of_a_blocking_request(h: Harness) -> None:
    for bits in (8, 32):
        reference = h.reference("A")
        transfer = {"anchor": 5, "residual": 5, "bits": bits, "blocking": True}
        name = h.lynx("A", first=reference.token_ids[0], **transfer)
        output = h.run()[name]
        assert tokens(output)[0] == reference.token_ids[0]
        assert len(tokens(output)) == len(reference.token_ids)
        if bits == 32:
            same(output, reference)
        assert h.emissions[name][0] <= 1 + h.asynchronous
        h.settle()


@case
def first_token_that_comes_too_late(h: Harness) -> None:
    """The request has begun to draft its first token itself."""
    reference = h.reference("A")
    name = h.lynx("A", residual=20, first=(reference.token_ids[0] + 1) % 500, first_delay=6)
    same(h.run()[name], reference)
    assert not h.events("first_token")


@case
def first_token_outside_of_the_vocabulary(h: Harness) -> None:
    reference = h.reference("A")
    name = h.lynx("A", first=1 << 30)
    same(h.run()[name], reference)
    assert not h.events("first_token")


@case
def first_token_in_the_metrics(h: Harness) -> None:
    reference = h.reference("A")
    name = h.lynx("A", anchor=9, residual=30, first=reference.token_ids[0])
    output = h.run()[name]
    metrics = output.metrics
    assert metrics.num_generation_tokens == len(reference.token_ids)
    assert h.emissions[name][0] <= 1 + h.asynchronous
    assert 0 < metrics.queued_ts <= metrics.scheduled_ts <= metrics.first_token_ts
    assert metrics.first_token_ts < metrics.last_token_ts
