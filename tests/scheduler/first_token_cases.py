# SPDX-License-Identifier: Apache-2.0
"""The prefill's own token, emitted before any KV: cases beside those of scheduler_cases.py."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from scheduler_cases import PHASES, _at, _once, _phase_params, case, same, tokens

if TYPE_CHECKING:
    from scheduler_harness import Harness


def _first(h: Harness, prompt: str, **params: Any) -> int:
    return int(h.reference(prompt, **params).token_ids[0])


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
    stop = h.tokenizer.decode([_first(h, "B")])
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
def first_token_and_a_lost_transfer(h: Harness) -> None:
    for transfer in (
        {"fail": True},
        {"fail_early": True},
        {"fail_early": True, "anchor": 1},
        {"lose_anchor": True},
        {"lose_anchor": True, "anchor": 1},
        {"lose_anchor": True, "anchor": 5, "blocking": True},
    ):
        for delay in (0, 1):
            reference, other_reference = h.reference("A", max_tokens=20), h.reference("C")
            other = h.add("C")
            name = h.lynx(
                "A", first=reference.token_ids[0], first_delay=delay, max_tokens=20, **transfer
            )
            outputs = h.run()
            same(outputs[name], reference)
            same(outputs[other], other_reference)
            h.settle()


@case
def first_token_and_a_lost_transfer_under_policy_fail(h: Harness) -> None:
    first = _first(h, "A")
    h.scheduler.recompute_kv_load_failures = False
    try:
        for transfer in (
            {"fail": True},
            {"fail_early": True},
            {"fail_early": True, "anchor": 9},
            {"lose_anchor": True, "anchor": 1},
            {"lose_anchor": True, "anchor": 5},
            {"lose_anchor": True, "anchor": 5, "blocking": True},
        ):
            name = h.lynx("A", first=first, **transfer)
            output = h.run()[name]
            assert tokens(output) in ([first], [])
            assert output.outputs[0].finish_reason == "error"
            h.settle()
    finally:
        h.scheduler.recompute_kv_load_failures = True


@case
def first_token_and_abort_in_every_phase(h: Harness) -> None:
    for phase in PHASES:
        params = _phase_params(phase) | {"logprobs": None, "max_tokens": 40}
        if phase == "paused":
            params["max_tokens"] = 7
        if phase == "between_groups":
            params["repetition_penalty"] = 1.01
        ids = list(h.reference("A", max_tokens=40, repetition_penalty=1.01).token_ids)
        name = h.lynx("A", first=ids[0], **params)
        if phase == "between_groups":
            h.force(ids[1:])
        on_step = _once(_at(h, phase), lambda name=name: h.engine.abort_request([name]))
        h.run(on_step)
        assert on_step.done or (phase == "verified" and h.flavour == "v1-async"), phase
        h.settle()


@case
def first_token_and_preemption_in_every_phase(h: Harness) -> None:
    last = -1 if h.flavour == "v1-async" else None  # as in preemption_in_every_phase
    for phase in PHASES[1:last]:
        params = _phase_params(phase) | {"logprobs": None}
        if phase == "paused":
            params["max_tokens"] = 7
        if phase == "between_groups":
            params["repetition_penalty"] = 1.01
        wanted = {k: v for k, v in params.items() if k in ("max_tokens", "repetition_penalty")}
        reference = h.reference("A", **wanted)
        ids = list(reference.token_ids)
        name = h.lynx("A", first=ids[0], **params)
        if phase == "between_groups":
            h.force(ids[1:])

        def preempt(name: str = name) -> None:
            (request,) = [r for r in h.scheduler.running if r.request_id.startswith(name + "-")]
            h.scheduler.running.remove(request)
            h.scheduler._preempt_request(request, time.monotonic(), drop_stale_output=True)

        on_step = _once(_at(h, phase), preempt)
        outputs = h.run(on_step)
        assert on_step.done, phase
        same(outputs[name], reference)
        h.settle()


@case
def first_token_while_blocks_run_out(h: Harness) -> None:
    references = {p: h.reference(p, max_tokens=72) for p in "ABCD"}
    names = {}
    for prompt, residual in (("A", 30), ("C", 3), ("D", 60), ("B", 50)):
        first = references[prompt].token_ids[0]
        names[h.lynx(prompt, residual=residual, max_tokens=72, first=first)] = prompt
    held: list[Any] = []

    def on_step(i: int) -> None:
        if i == 6:
            held.extend(h.pool.get_new_blocks(h.pool.get_num_free_blocks() - 2))

    outputs = h.run(on_step)
    h.pool.free_blocks(held)
    for name, prompt in names.items():
        same(outputs[name], references[prompt])


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
