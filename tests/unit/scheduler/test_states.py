# SPDX-License-Identifier: Apache-2.0
"""The life of a lossy request, without vLLM: examples, and laws over arbitrary models."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lynx_connector.lifecycle.request import RequestEvent
from lynx_connector.scheduler.states import (
    Drafting,
    PauseReason,
    SamplingFacts,
    Verifying,
    VerifyPath,
)

TOKENS = st.integers(0, 4)


def anchored(**bounds: Any) -> Drafting:
    """A request that is about to draft."""
    drafting = Drafting.start(**bounds)
    drafting.life.on(RequestEvent.ANCHOR)
    return drafting


def test_importable_without_vllm_and_torch() -> None:
    code = (
        "import sys, lynx_connector.scheduler.states, lynx_connector.scheduler.port;"
        "sys.exit(bool({'vllm', 'torch', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- drafting


@pytest.mark.parametrize(
    ("draft_limit", "max_tokens", "context_left", "limit", "reason"),
    [
        (64, 1000, 1000, 64, PauseReason.LIMIT),
        (64, 10, 1000, 9, PauseReason.MAX_TOKENS),
        (64, 1000, 7, 6, PauseReason.NO_ROOM),
        (64, 1, 1000, 0, PauseReason.MAX_TOKENS),
        (64, 1000, 0, 0, PauseReason.NO_ROOM),
    ],
)
def test_draft_limit(
    draft_limit: int, max_tokens: int, context_left: int, limit: int, reason: PauseReason
) -> None:
    drafting = anchored(draft_limit=draft_limit, max_tokens=max_tokens, context_left=context_left)
    assert drafting.limit == limit
    for token in range(max(limit - 1, 0)):
        assert drafting.append(token) is None
    assert drafting.append(99) == reason
    assert len(drafting.drafts) == limit
    with pytest.raises(RuntimeError):
        drafting.append(99)


def test_grammars_that_cannot_be_rolled_back_are_not_drafted() -> None:
    drafting = anchored(draft_limit=8, max_tokens=9, context_left=9, may_draft=False)
    assert drafting.append(1) is PauseReason.GRAMMAR
    assert (drafting.drafts, drafting.rows) == ([], 1)


def test_a_terminal_draft_pauses_and_needs_no_row_behind_it() -> None:
    drafting = anchored(draft_limit=8, max_tokens=9, context_left=99, terminal={2})
    assert drafting.append(1) is None
    assert drafting.rows == 2
    assert drafting.append(2) is PauseReason.EOS
    assert drafting.rows == 2


def test_an_outer_pause_keeps_the_first_reason() -> None:
    drafting = anchored(draft_limit=1, max_tokens=9, context_left=99)
    drafting.append(1)
    drafting.pause(PauseReason.NO_ROOM)
    assert drafting.paused is PauseReason.LIMIT


@given(st.integers(0, 6), st.integers(1, 6), st.integers(0, 6), st.sets(TOKENS), st.lists(TOKENS))
def test_drafts_are_never_more_than_can_be_emitted(
    draft_limit: int, max_tokens: int, context_left: int, terminal: set[int], stream: list[int]
) -> None:
    drafting = anchored(
        draft_limit=draft_limit,
        max_tokens=max_tokens,
        context_left=context_left,
        terminal=terminal,
    )
    for token in stream:
        if drafting.append(token) is not None:
            break
    assert len(drafting.drafts) <= draft_limit
    assert drafting.rows <= max_tokens
    assert drafting.rows <= max(context_left, 1)
    assert drafting.drafts == stream[: len(drafting.drafts)]
    assert not terminal & set(drafting.drafts[:-1])


@given(st.integers(0, 6), st.integers(2, 6), st.integers(2, 6))
def test_a_confirmed_token_leaves_room_for_one_draft_less(
    draft_limit: int, max_tokens: int, context_left: int
) -> None:
    bounds = {"max_tokens": max_tokens - 1, "context_left": context_left - 1}
    drafting = Drafting.start(
        draft_limit=draft_limit, max_tokens=max_tokens, context_left=context_left, terminal={2}
    )
    drafting.refined = True
    drafting.confirm(draft_limit=draft_limit, **bounds)
    fresh = Drafting.start(draft_limit=draft_limit, **bounds, terminal={2})
    assert (drafting.limit, drafting.limit_reason) == (fresh.limit, fresh.limit_reason)
    assert (drafting.confirmed, drafting.refined, drafting.terminal) == (1, True, {2})


def test_confirming_keeps_a_grammar_from_drafting() -> None:
    drafting = Drafting.start(draft_limit=8, max_tokens=9, context_left=9, may_draft=False)
    drafting.confirm(draft_limit=8, max_tokens=8, context_left=8)
    drafting.life.on(RequestEvent.ANCHOR)
    assert drafting.append(1) is PauseReason.GRAMMAR


def test_drafts_are_not_confirmed_unverified() -> None:
    drafting = anchored(draft_limit=8, max_tokens=9, context_left=9)
    drafting.append(1)
    with pytest.raises(RuntimeError):
        drafting.confirm(draft_limit=8, max_tokens=8, context_left=8)


# ---- verifying


def decode(model: Callable[[tuple[int, ...]], int], length: int) -> list[int]:
    output: list[int] = []
    while len(output) < length:
        output.append(model(tuple(output)))
    return output


@given(st.randoms(use_true_random=False), st.lists(TOKENS, max_size=12), st.integers(1, 5))
def test_emits_exactly_what_the_model_would(random: object, drafts: list[int], group: int) -> None:
    """For any model and any drafts: row i samples given the drafts before it; the emitted tokens
    are a prefix of ordinary decoding, at least one and at most one more than was accepted."""
    cache: dict[tuple[int, ...], int] = {}

    def model(output: tuple[int, ...]) -> int:
        return cache.setdefault(output, random.randrange(5))  # type: ignore[attr-defined]

    state = Verifying(VerifyPath.ROWS, list(drafts), len(drafts) + 1)
    done = False
    while not done:
        rows = state.next_rows(group)
        assert 0 < len(rows) <= group
        state.sent(f"row{i}" for i in rows)
        assert len(state.in_flight) == len(rows)
        done = state.receive(model(tuple(drafts[:i])) for i in rows)
        assert state.in_flight == ()
    truth = decode(model, len(drafts) + 1)
    assert state.emitted == truth[: len(state.emitted)]
    assert len(state.emitted) == state.accepted + 1
    assert state.accepted == next(
        (i for i, (d, t) in enumerate(zip(drafts, truth, strict=False)) if d != t), len(drafts)
    )
    assert state.steps == -(-len(state.emitted) // group)
    rejected = state.rejected_token
    assert rejected == (drafts[state.accepted] if state.accepted < len(drafts) else None)


@given(st.lists(TOKENS, min_size=1, max_size=8), st.lists(TOKENS, min_size=8, max_size=8))
def test_a_closed_verification_emits_no_more_than_its_drafts(
    drafts: list[int], samples: list[int]
) -> None:
    state = Verifying(VerifyPath.ONE_PASS, list(drafts), len(drafts))
    assert state.inputs == drafts[:-1]
    assert state.receive(samples[: len(drafts)])
    assert 1 <= len(state.emitted) <= len(drafts)
    assert state.accepted in (len(state.emitted), len(state.emitted) - 1)


@given(st.lists(TOKENS, max_size=8), st.integers(0, 9), st.booleans())
def test_shortening_leaves_a_verification_of_that_many_drafts(
    drafts: list[int], room: int, closed: bool
) -> None:
    rows = len(drafts) if closed and drafts else len(drafts) + 1
    state = Verifying(VerifyPath.ROWS, list(drafts), rows)
    state.shorten(room)
    assert len(state.inputs) == min(room, rows - 1)
    assert state.rows == len(state.inputs) + 1
    assert state.drafts == (drafts if room >= rows - 1 else drafts[:room])


# ---- the choice of a path

PLAIN = {
    "greedy": True,
    "shapes_logits": False,
    "wants_logprobs": False,
    "reads_outputs": False,
    "opaque": False,
}


@pytest.mark.parametrize(
    ("facts", "situation", "path"),
    [
        ({}, {}, VerifyPath.ONE_PASS),
        ({}, {"rows": 1}, VerifyPath.ROWS),
        ({}, {"one_pass_fits": False}, VerifyPath.ROWS),
        ({}, {"slots": 0}, VerifyPath.REWIND),
        ({"greedy": False}, {}, VerifyPath.ROWS),
        ({"wants_logprobs": True}, {}, VerifyPath.ROWS),
        ({"shapes_logits": True}, {}, VerifyPath.ROWS),
        ({"reads_outputs": True}, {}, VerifyPath.REWIND),
        ({"reads_outputs": True}, {"v2_runner": True}, VerifyPath.ROWS),
        ({"opaque": True}, {"v2_runner": True}, VerifyPath.REWIND),
    ],
)
def test_path(facts: dict[str, bool], situation: dict[str, bool], path: VerifyPath) -> None:
    plain = {"v2_runner": False, "rows": 9, "one_pass_fits": True, "slots": 1}
    assert SamplingFacts(**(PLAIN | facts)).path(**(plain | situation)) is path  # type: ignore[arg-type]
