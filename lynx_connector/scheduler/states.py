# SPDX-License-Identifier: Apache-2.0
"""What one lossy request needs to remember in the scheduler, without vLLM and without torch.

`lifecycle/request.py` says what it goes through. `Drafting` holds it until its cache is refined,
`Verifying` until its drafts are checked; a request without either is an ordinary one.

Token positions: P tokens are confirmed, the prompt and with it the first output token where the
prefill has handed one over. Row i of a verification reads the token at position P - 1 + i (the last
confirmed token, then draft 1, draft 2, ...) and samples s_i, the genuine token for position P + i.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from lynx_connector.lifecycle.machine import Life
from lynx_connector.lifecycle.request import RequestEvent, RequestState, request_life


class PauseReason(StrEnum):
    """Why a request stops drafting before its final tier is in place."""

    LIMIT = "limit"  # the connector's draft limit
    EOS = "eos"  # an end-of-sequence or stop token was drafted
    MAX_TOKENS = "max_tokens"  # more drafts could never be emitted
    NO_ROOM = "no_room"  # the context is full or no KV block is free
    GRAMMAR = "grammar"  # the request's grammar allows no further draft


class VerifyPath(StrEnum):
    """How drafts are checked; the first exact one is taken, in this order."""

    ONE_PASS = "one_pass"  # one shadow of k + 1 tokens, argmax of every position
    ROWS = "rows"  # k + 1 shadows of one token, sampled under the request's own parameters
    REWIND = "rewind"  # no check: drop the drafts and decode again from the refined cache


@dataclass(frozen=True)
class SamplingFacts:
    """What decides which verification of a request is exact."""

    greedy: bool
    shapes_logits: bool  # penalties, bias, masks: the sampled token is not the plain argmax
    wants_logprobs: bool
    reads_outputs: bool  # looks at output tokens apart from the prompt (presence penalty, ...)
    opaque: bool  # needs state that a shadow request does not carry

    def path(self, *, v2_runner: bool, rows: int, one_pass_fits: bool, slots: int) -> VerifyPath:
        """The cheapest exact path for `rows` positions, given `slots` spare runner slots.

        vLLM's V1 runner files the drafts that a row has read under its prompt, so there nothing
        that reads outputs is exact by rows; the V2 runner keeps the two apart.
        """
        if self.opaque or slots < 1 or (self.reads_outputs and not v2_runner):
            return VerifyPath.REWIND
        if (
            self.greedy
            and not (self.shapes_logits or self.wants_logprobs or self.reads_outputs)
            and rows > 1
            and one_pass_fits
        ):
            return VerifyPath.ONE_PASS
        return VerifyPath.ROWS


@dataclass
class Drafting:
    """A request whose KV is lossy: waits for its anchor, then collects drafts, then may pause."""

    limit: int
    limit_reason: PauseReason
    terminal: frozenset[int] = frozenset()  # tokens that end the request when emitted
    drafts: list[int] = field(default_factory=list)
    paused: PauseReason | None = None
    refined: bool = False
    failure: str | None = None
    grammar_steps: int = 0  # tokens by which the request's grammar is ahead of its output
    confirmed: int = 0  # output tokens before the drafts that are already emitted
    life: Life[RequestState, RequestEvent] = field(default_factory=request_life)

    @classmethod
    def start(
        cls,
        *,
        draft_limit: int,
        max_tokens: int,
        context_left: int,
        terminal: Iterable[int] = (),
        may_draft: bool = True,
    ) -> "Drafting":
        """Set the draft limit.

        k drafts verify into at most k + 1 tokens, hence never more than `max_tokens` - 1 drafts,
        nor more than `context_left` - 1, where `context_left` counts the tokens that still fit
        behind the prompt.
        """
        drafting = cls(0, PauseReason.LIMIT, frozenset(terminal))
        drafting._bound(draft_limit, max_tokens, context_left, may_draft)
        return drafting

    def confirm(self, *, draft_limit: int, max_tokens: int, context_left: int) -> None:
        """One output token was emitted before any draft; arguments as in `start`, now."""
        self.life.on(RequestEvent.CONFIRM)
        self.confirmed += 1
        self._bound(draft_limit, max_tokens, context_left, self.limit_reason != PauseReason.GRAMMAR)

    def _bound(self, draft_limit: int, max_tokens: int, context_left: int, may_draft: bool) -> None:
        bounds = [
            (draft_limit, PauseReason.LIMIT),
            (max_tokens - 1, PauseReason.MAX_TOKENS),
            (context_left - 1, PauseReason.NO_ROOM),
        ]
        if not may_draft:
            bounds.append((0, PauseReason.GRAMMAR))
        limit, self.limit_reason = min(bounds, key=lambda bound: bound[0])
        self.limit = max(limit, 0)

    def append(self, token: int) -> PauseReason | None:
        """Record one decoded token; returns the reason when drafting must pause now."""
        self.life.on(RequestEvent.DRAFT)
        if self.limit:
            self.drafts.append(token)
        if self.limit and token in self.terminal:
            self.pause(PauseReason.EOS)
        elif len(self.drafts) >= self.limit:
            self.pause(self.limit_reason)
        return self.paused

    def pause(self, reason: PauseReason) -> None:
        """Stop drafting for a cause outside of the drafts themselves."""
        if self.paused is None:
            self.life.on(RequestEvent.PAUSE)
            self.paused = reason

    def fail(self, cause: str) -> None:
        """The rest of the KV will not come."""
        self.life.on(RequestEvent.FAIL)
        self.failure = cause

    @property
    def rows(self) -> int:
        """Positions to verify: one more than drafts, unless the last draft ends the request."""
        closed = self.paused is PauseReason.EOS
        return len(self.drafts) + (not closed)


@dataclass
class Verifying:
    """A request whose drafts are being checked against the refined cache.

    `emitted` holds s_0, s_1, ... up to and including the first that differs from its draft. Each is
    a sample of the refined model given a prefix of samples of the refined model; a mismatching
    draft is never "resampled", its own s_i is emitted, so the output distribution is untouched.
    """

    how: VerifyPath
    drafts: list[int]
    rows: int
    started: float = 0.0  # seconds, time.monotonic()
    emitted: list[int] = field(default_factory=list)
    in_flight: tuple[str, ...] = ()  # shadow ids, in row order; one_pass has one for all rows
    steps: int = 0
    life: Life[RequestState, RequestEvent] = field(
        default_factory=lambda: request_life(RequestState.VERIFYING)
    )

    def shorten(self, inputs: int) -> None:
        """Verify no further than rows that read `inputs` drafts (no KV slots for more)."""
        if inputs < self.rows - 1:
            del self.drafts[inputs:]
            self.rows = inputs + 1

    @property
    def inputs(self) -> list[int]:
        """The drafts that rows read, that is, whose KV verification writes: rows - 1 of them."""
        return self.drafts[: self.rows - 1]

    def next_rows(self, most: int) -> range:
        """The next group of at most `most` rows; all rows before it were accepted."""
        first = len(self.emitted)
        return range(first, min(first + max(most, 0), self.rows))

    def sent(self, shadow_ids: Iterable[str]) -> None:
        """A group of rows is on its way."""
        self.in_flight = tuple(shadow_ids)
        self.steps += 1

    def receive(self, samples: Iterable[int]) -> bool:
        """Take the samples of the group in flight; True when verification has ended."""
        self.in_flight = ()
        for token in samples:
            row = len(self.emitted)
            self.emitted.append(token)
            if row + 1 >= self.rows or token != self.drafts[row]:
                return True
        return False

    @property
    def accepted(self) -> int:
        """Drafts that equal the tokens emitted in their places."""
        return sum(s == d for s, d in zip(self.emitted, self.drafts, strict=False))

    @property
    def rejected_token(self) -> int | None:
        """The first draft that was not accepted, None when all were."""
        return self.drafts[self.accepted] if self.accepted < len(self.drafts) else None
