# SPDX-License-Identifier: Apache-2.0
"""Catching a request in a phase of its life, to interrupt it there."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..harness import Harness


PHASES = ("loading", "drafting", "paused", "between_groups", "verified", "later")


def phase_params(phase: str) -> dict[str, Any]:
    """What `Harness.lynx` is given, so that its request passes through the phase."""
    params: dict[str, Any] = {"anchor": 4, "residual": 20, "max_tokens": 40}
    if phase == "paused":
        params["max_tokens"] = 6
    if phase == "between_groups":
        params["logprobs"] = 0
        params["residual"] = 30
    return params


def at(h: Harness, phase: str) -> Callable[[], bool]:
    """Whether the engine is, between two steps, in a phase of its one Lynx request."""
    scheduler = h.scheduler
    states = scheduler._verifier._states
    return {
        "loading": lambda: any(not d.drafts for d in scheduler._drafting.values()),
        "drafting": lambda: any(len(d.drafts) > 3 for d in scheduler._drafting.values()),
        "paused": lambda: any(d.paused for d in scheduler._drafting.values()),
        "between_groups": lambda: any(v.emitted for v in states.values()),
        "verified": lambda: bool(scheduler._restoring),
        "later": lambda: bool(h.events("verified")) and not scheduler._restoring,
    }[phase]


def once(condition: Callable[[], bool], action: Callable[[], Any]) -> Callable[[int], None]:
    """A hook for `Harness.run`: acts once, when the condition holds; `done` is then not empty."""
    done: list[bool] = []

    def on_step(_: int) -> None:
        if not done and condition():
            done.append(True)
            action()

    on_step.done = done  # type: ignore[attr-defined]
    return on_step


def preempt(h: Harness, name: str) -> None:
    """Preempt a running request, as vLLM does for want of blocks."""
    (request,) = [r for r in h.scheduler.running if r.request_id.startswith(name + "-")]
    h.scheduler.running.remove(request)
    h.scheduler._preempt_request(request, time.monotonic(), drop_stale_output=True)
