# SPDX-License-Identifier: Apache-2.0
"""How long steps take, as seen by a scheduler."""

import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping

STEPS = 32

PREFILL_STEPS = 3
"""Recent ones only: with a longer context a token takes longer."""
PREFILL_TOKENS = 64
"""Tokens of a step from which it says something of the time that a token takes."""


class StepMeter:
    """Median time of the recent decode steps.

    Only a step in which every request computes one token counts, and only if one of its requests
    goes on in the next step: otherwise the instance may have been idle in between. The median,
    since one stalled step must not change a plan.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._last: tuple[float, frozenset[str]] | None = None
        self._seconds: deque[float] = deque(maxlen=STEPS)

    def step(self, scheduled: Mapping[str, int]) -> None:
        """A step begins: tokens to compute by request."""
        now = self._clock()
        if self._last is not None and not self._last[1].isdisjoint(scheduled):
            self._seconds.append(now - self._last[0])
        decodes = scheduled and all(tokens == 1 for tokens in scheduled.values())
        self._last = (now, frozenset(scheduled)) if decodes else None

    @property
    def step_ms(self) -> float:
        """Milliseconds; 0 while fewer than 4 steps were seen."""
        return 1e3 * statistics.median(self._seconds) if len(self._seconds) >= 4 else 0.0


class PrefillMeter:
    """Recent prefill steps: how many tokens each computed, and how long it took.

    As in `StepMeter` a step counts if one of its requests goes on in the next one.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._last: tuple[float, Mapping[str, int]] | None = None
        self._steps: deque[tuple[int, float]] = deque(maxlen=PREFILL_STEPS)

    def step(self, scheduled: Mapping[str, int]) -> None:
        """A step begins: tokens to compute by request."""
        now = self._clock()
        if self._last is not None and not self._last[1].keys().isdisjoint(scheduled):
            tokens = sum(self._last[1].values())
            if tokens >= PREFILL_TOKENS:
                self._steps.append((tokens, now - self._last[0]))
        self._last = (now, dict(scheduled)) if scheduled else None

    def token_s(self, pass_s: float) -> float | None:
        """Seconds that a token adds to a step, where a step of few tokens takes `pass_s`: the
        median. None while no step was seen."""
        if not self._steps:
            return None
        return statistics.median(
            max(seconds - pass_s, 0.0) / tokens for tokens, seconds in self._steps
        )
