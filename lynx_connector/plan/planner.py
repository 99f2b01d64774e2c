# SPDX-License-Identifier: Apache-2.0
"""The prefill instance's planner: what its workers measured, and the plan of each request."""

import logging
import time
from collections.abc import Mapping

from lynx_connector.plan.meters import PrefillMeter
from lynx_connector.plan.policy import (
    DEFAULT_STEP_MS,
    Choice,
    Measured,
    Wanted,
    choose,
    configured,
)
from lynx_connector.plan.shape import KVShape
from lynx_connector.plan.taper import Pace, Unsent, next_chunk

logger = logging.getLogger("vllm.lynx.plan")

STAGING_MARGIN = 1.1
"""Staging reserves for an exact tier what `tiers.pieces` estimates, a little more than the plan."""


class Planner:
    """Decides how the KV of a request travels.

    auto: plan by what was measured, else always as configured. shape: of one worker's cache.
    device: "cpu" or "gpu", where codecs run. limit_mbit: rate limit of the sender; 0: none.
    """

    def __init__(self, auto: bool, shape: KVShape, device: str, limit_mbit: float = 0.0):
        self._auto = auto
        self._shape = shape
        self._device = device
        self._limit = limit_mbit
        self._link_mbit: dict[int, float] = {}
        self._step_ms: dict[int, float] = {}
        self._prefills = PrefillMeter()

    def step(self, scheduled: Mapping[str, int]) -> None:
        """A step of the engine begins: tokens to compute by request."""
        self._prefills.step(scheduled)

    def update(self, link_mbit: Mapping[int, float], step_ms: Mapping[int, float]) -> None:
        """What workers measured, by rank."""
        self._link_mbit.update(link_mbit)
        self._step_ms.update(step_ms)

    @property
    def measured(self) -> Measured:
        """Rate of the slowest rank's link, and the decode instance's step time."""
        link = min(self._link_mbit.values(), default=None)
        if link is not None and self._limit:
            link = min(link, self._limit)
        return Measured(link, max(self._step_ms.values(), default=None))

    def plan(self, request_id: str, wanted: Wanted, tokens: int, in_flight: int) -> Choice:
        """The plan of a request of `tokens` tokens, one of `in_flight` that share the link."""
        if self._auto:
            choice = choose(
                wanted,
                self._shape,
                tokens,
                self.measured,
                in_flight=in_flight,
                device=self._device,
            )
        else:
            choice = configured(wanted, self._shape, "plan: fixed")
        logger.info("lynx: request %s: plan %s: %s", request_id, choice.name, choice.why)
        return choice

    def staged_bytes(self, wanted: Wanted, tokens: int, raw_tokens: int) -> int:
        """Most host memory of a request's tiers on one worker, `raw_tokens` of it as they are.

        With `auto` the plain copy may be chosen, which is the largest.
        """
        shape = self._shape
        bits = shape.element_bits if self._auto else configured(wanted, shape, "").bits
        raw = min(tokens, raw_tokens)
        coded = (tokens - raw) * shape.elements_per_token * bits / 8
        return raw * shape.bytes_per_token + int(coded * STAGING_MARGIN)

    def next_chunk(self, left: int, most: int, bits: float, unsent: Unsent, block_size: int) -> int:
        """Tokens to compute next of a prompt's `left` last ones, at most `most`, where an element
        takes `bits` on the wire: `taper`. `most` while a time is not known."""
        measured = self.measured
        pass_s = (measured.step_ms or DEFAULT_STEP_MS) / 1e3
        token_s = self._prefills.token_s(pass_s)
        if measured.link_mbit is None or token_s is None:
            return most
        wire_s = self._shape.elements_per_token * bits / (measured.link_mbit * 1e6)
        before = unsent.update(left, time.monotonic(), wire_s)
        return next_chunk(left, most, Pace(pass_s, token_s, wire_s), before, block_size)
