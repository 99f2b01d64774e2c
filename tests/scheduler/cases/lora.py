# SPDX-License-Identifier: Apache-2.0
"""Speculative start of requests with LoRA adapters, in batches where not all fit at once."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from .phases import at, once, phase_params
from .registry import case, same
from .structured import regex

if TYPE_CHECKING:
    from ..harness import Harness

ONE = ("v1-sync+lora1", "v1-async+lora1")
TWO = ("v1-sync+lora2", "v2-sync+lora2")
ALL = (*ONE, *TWO)


def _mixed(
    h: Harness, wanted: list[tuple[str, str | None, dict[str, Any]]], **transfer: Any
) -> None:
    """All at once over the transfer; each must say what it says alone."""
    references = [h.reference(p, lora=lora, **params) for p, lora, params in wanted]
    names = [h.lynx(p, lora=lora, **transfer, **params) for p, lora, params in wanted]
    outputs = h.run()
    for name, reference in zip(names, references, strict=True):
        same(outputs[name], reference)


@case(flavours=ALL)
def lora_adapters_say_different_things(h: Harness) -> None:
    said = {h.reference("A", lora=lora).text for lora in (None, "a", "b", "c")}
    assert len(said) == 4


@case(flavours=ALL)
def lora_six_greedy_requests_at_once(h: Harness) -> None:
    loras = [None, "a", "b", None, "a", "b"]
    _mixed(h, [(p, lora, {}) for p, lora in zip("ABCDEF", loras, strict=True)], residual=10)
    verified = h.events("verified")
    assert {event["how"] for event in verified} == {"rows"}
    assert len(verified) >= 4  # with room for one adapter some are refined before they may run


@case(flavours=TWO)
def lora_three_adapters_and_room_for_two(h: Harness) -> None:
    loras = ["a", "b", "c", "c", "a", None]
    for residual in (4, 14):
        wanted = [(p, lora, {}) for p, lora in zip("ABCDEF", loras, strict=True)]
        _mixed(h, wanted, residual=residual)
        h.settle()


@case(flavours=ALL)
def lora_adapter_waits_for_one_that_is_frozen(h: Harness) -> None:
    """A request that has paused or verifies is in no step, yet its adapter is needed again."""
    frozen = h.reference("A", lora="a", logprobs=0, max_tokens=40)
    others = {p: h.reference(p, lora=lora) for p, lora in (("B", "b"), ("C", "c"))}
    name = h.lynx("A", residual=26, lora="a", logprobs=0, max_tokens=40)
    h.force(list(frozen.token_ids))
    added: dict[str, str] = {}

    def on_step(i: int) -> None:
        if h.events("paused" if i < 15 else "verify_started") and len(added) < 2:
            prompt, lora = (("B", "b"), ("C", "c"))[len(added)]
            added[h.add(prompt, lora=lora)] = prompt

    h.port.draft_limit = 8
    try:
        outputs = h.run(on_step)
    finally:
        del h.port.draft_limit
    assert list(outputs[name].outputs[0].token_ids) == list(frozen.token_ids)
    assert len(added) == 2
    for other, prompt in added.items():
        same(outputs[other], others[prompt])


@case(flavours=TWO)
def lora_rows_of_two_adapters_in_one_step(h: Harness) -> None:
    wanted = [("A", "a", {"logprobs": 1}), ("B", "b", {"logprobs": 1})]
    references = [h.reference(p, lora=lora, **params) for p, lora, params in wanted]
    steps: list[set[str]] = []
    verifier = h.scheduler._verifier
    send, rows = verifier.send, verifier._verify_rows

    def watched(output: Any) -> None:
        send(output)
        steps.append({rid for rid, state in verifier._states.items() if state.in_flight})

    verifier.send, verifier._verify_rows = watched, 3
    try:
        names = [h.lynx(p, lora=lora, residual=12, **params) for p, lora, params in wanted]
        outputs = h.run()
    finally:
        del verifier.send
        verifier._verify_rows = rows
    assert max(len(step) for step in steps) == 2
    for name, reference in zip(names, references, strict=True):
        same(outputs[name], reference)
        ours, theirs = outputs[name].outputs[0].logprobs, reference.logprobs
        for one, other in zip(ours, theirs, strict=True):
            assert one.keys() == other.keys()
            assert all(abs(one[t].logprob - other[t].logprob) < 1e-4 for t in one)


@case(flavours=ALL)
def lora_with_parameters_of_every_path(h: Harness) -> None:
    wanted: list[tuple[str, str | None, dict[str, Any]]] = [
        ("A", "a", {"repetition_penalty": 1.3}),
        ("B", "b", {"presence_penalty": 0.7}),
        ("C", "a", {"logprobs": 3}),
        ("D", None, regex("[a-h]{6}-([0-9]{4}|[x-z]{9})(,[p-w]{2})+")),
        ("E", "b", regex("[i-p]{12}=[q-z]{24}")),
        ("F", "a", {"min_p": 0.1, "top_k": 5}),
    ]
    _mixed(h, wanted, residual=12)
    hows = {event["how"] for event in h.events("verify_started")}
    assert "rows" in hows
    assert hows <= ({"rows"} if h.v2 else {"rows", "rewind"})


@case(flavours=ALL)
def lora_sampling_is_the_requests_own(h: Harness) -> None:
    """At random, too, an adapter's rows are drawn from that adapter's tokens only."""
    banned = h.reference("A", lora="a").token_ids[0]
    params = {"temperature": 0.9, "seed": 3, "logit_bias": {banned: -100.0}}
    runs = []
    for _ in range(2):
        name = h.lynx("A", lora="a", residual=10, bits=8, **params)
        h.lynx("B", lora="b", residual=10, bits=8, temperature=0.9)
        runs.append(list(h.run()[name].outputs[0].token_ids))
        h.settle()
    assert runs[0] == runs[1]
    assert banned not in runs[0]


@case(flavours=ALL)
def lora_first_token_then_verification(h: Harness) -> None:
    reference, other_reference = h.reference("A", lora="a"), h.reference("B", lora="b")
    name = h.lynx("A", lora="a", anchor=4, residual=14, first=reference.token_ids[0])
    other = h.lynx("B", lora="b", anchor=2, residual=9, first=other_reference.token_ids[0])
    outputs = h.run()
    same(outputs[name], reference)
    same(outputs[other], other_reference)
    assert len(h.events("first_token")) == 2


@case(flavours=ALL)
def lora_request_is_preempted_in_every_phase(h: Harness) -> None:
    for phase in ("drafting", "paused", "between_groups"):
        params = phase_params(phase)
        wanted = {k: v for k, v in params.items() if k in ("max_tokens", "logprobs")}
        reference = h.reference("A", lora="a", **wanted)
        neighbour = "b" if h.variant == "lora2" else None
        other_reference = h.reference("C", lora=neighbour)
        name = h.lynx("A", lora="a", **params)
        other = h.add("C", lora=neighbour)
        if phase == "between_groups":
            h.force(list(reference.token_ids))

        def preempt(name: str = name) -> None:
            (request,) = [r for r in h.scheduler.running if r.request_id.startswith(name + "-")]
            h.scheduler.running.remove(request)
            h.scheduler._preempt_request(request, time.monotonic(), drop_stale_output=True)

        on_step = once(at(h, phase), preempt)
        outputs = h.run(on_step)
        assert on_step.done, phase
        same(outputs[name], reference)
        same(outputs[other], other_reference)
        h.settle()


@case(flavours=ALL)
def lora_load_is_lost(h: Harness) -> None:
    wanted = [("A", "a", {}), ("B", "b", {}), ("C", None, {})]
    for transfer in ({"fail": True}, {"fail_early": True}, {"lose_anchor": True}):
        _mixed(h, wanted, **transfer)
        h.settle()
