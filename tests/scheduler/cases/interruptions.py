# SPDX-License-Identifier: Apache-2.0
"""Aborts and preemptions in every phase, and blocks that run out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .phases import PHASES, at, once, phase_params, preempt
from .registry import case, same

if TYPE_CHECKING:
    from ..harness import Harness


@case
def abort_in_every_phase(h: Harness) -> None:
    for phase in PHASES:
        reference = h.reference("C")
        params = phase_params(phase)
        drafts = list(h.reference("A", max_tokens=40).token_ids)
        name = h.lynx("A", **params)
        other = h.add("C")
        if phase == "between_groups":
            h.force(drafts)
        on_step = once(at(h, phase), lambda name=name: h.engine.abort_request([name]))
        outputs = h.run(on_step)
        assert on_step.done, phase
        same(outputs[other], reference)
        h.settle()


@case
def abort_with_shadows_in_flight(h: Harness) -> None:
    from vllm.v1.request import RequestStatus

    for params in ({}, {"logprobs": 0}):
        name = h.lynx("A", **params)
        schedule = type(h.scheduler).schedule
        aborted: list[str] = []

        def aborting(*args: Any, schedule: Any = schedule, aborted: Any = aborted) -> Any:
            output = schedule(h.scheduler, *args)
            states = h.scheduler._verifier._states
            if states and not aborted:
                aborted.extend(states)
                assert all(state.in_flight for state in states.values())
                h.scheduler.finish_requests(list(states), RequestStatus.FINISHED_ABORTED)
            return output

        h.scheduler.schedule = aborting
        for _ in range(40):
            h.step()
        del h.scheduler.schedule
        assert aborted
        h.engine.abort_request([name])
        h.settle()


@case
def preemption_in_every_phase(h: Harness) -> None:
    # Preempting with a step in flight needs an asynchronous runner, which v1-async does not have:
    # V1's synchronous runner would keep the dropped token of a request that was sent anew.
    last = -1 if h.flavour == "v1-async" else None
    for phase in PHASES[1:last]:
        params = phase_params(phase)
        wanted = {k: v for k, v in params.items() if k in ("max_tokens", "logprobs")}
        reference, other_reference = h.reference("A", **wanted), h.reference("C")
        name, other = h.lynx("A", **params), h.add("C")
        if phase == "between_groups":
            h.force(list(reference.token_ids))

        on_step = once(at(h, phase), lambda name=name: preempt(h, name))
        outputs = h.run(on_step)
        assert on_step.done, phase
        same(outputs[name], reference)
        same(outputs[other], other_reference)
        states = [event["state"] for event in h.events("preempted")]
        expected = {"drafting": "drafting", "paused": "drafting", "between_groups": "verifying"}
        assert states == ([expected[phase]] if phase in expected else []), phase
        h.settle()


@case
def no_block_left(h: Harness) -> None:
    """A drafting request pauses rather than take blocks from others, and verifies what it can."""
    reference = h.reference("A", max_tokens=60)
    name = h.lynx("A", residual=60, max_tokens=60)
    held: list[Any] = []

    def on_step(i: int) -> None:
        if i == 6:
            held.extend(h.pool.get_new_blocks(h.pool.get_num_free_blocks()))
        if i == 75:
            h.pool.free_blocks(held)

    outputs = h.run(on_step)
    same(outputs[name], reference)
    assert [event["why"] for event in h.events("paused")] == ["no_room"]
    assert 20 < h.verified()["drafted"] < 32


@case
def blocks_run_out(h: Harness) -> None:
    """vLLM's own preemption for want of blocks, with Lynx requests among the victims."""
    references = {p: h.reference(p, max_tokens=72) for p in "ABCD"}
    names = {
        h.lynx("A", residual=30, max_tokens=72): "A",
        h.add("C", max_tokens=72): "C",
        h.add("D", max_tokens=72): "D",
        h.lynx("B", residual=50, max_tokens=72): "B",
    }
    held: list[Any] = []

    def on_step(i: int) -> None:
        if i == 6:
            held.extend(h.pool.get_new_blocks(h.pool.get_num_free_blocks() - 2))

    outputs = h.run(on_step)
    h.pool.free_blocks(held)
    for name, prompt in names.items():
        same(outputs[name], references[prompt])
