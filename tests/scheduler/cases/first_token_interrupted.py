# SPDX-License-Identifier: Apache-2.0
"""Requests whose first token is out when their transfer fails or they are interrupted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .phases import PHASES, at, once, phase_params, preempt
from .registry import case, same, tokens

if TYPE_CHECKING:
    from ..harness import Harness


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
    first = h.reference("A").token_ids[0]
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
        params = phase_params(phase) | {"logprobs": None, "max_tokens": 40}
        if phase == "paused":
            params["max_tokens"] = 7
        if phase == "between_groups":
            params["repetition_penalty"] = 1.01
        ids = list(h.reference("A", max_tokens=40, repetition_penalty=1.01).token_ids)
        name = h.lynx("A", first=ids[0], **params)
        if phase == "between_groups":
            h.force(ids[1:])
        on_step = once(at(h, phase), lambda name=name: h.engine.abort_request([name]))
        h.run(on_step)
        assert on_step.done or (phase == "verified" and h.flavour == "v1-async"), phase
        h.settle()


@case
def first_token_and_preemption_in_every_phase(h: Harness) -> None:
    last = -1 if h.flavour == "v1-async" else None  # as in preemption_in_every_phase
    for phase in PHASES[1:last]:
        params = phase_params(phase) | {"logprobs": None}
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

        on_step = once(at(h, phase), lambda name=name: preempt(h, name))
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
