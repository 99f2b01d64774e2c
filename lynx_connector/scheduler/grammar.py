# SPDX-License-Identifier: Apache-2.0
"""Structured output while drafting and verifying.

A drafting request's grammar runs ahead with its drafts, so that they are drawn from what the
grammar allows; it is rolled back to the end of the prompt before they are verified. Every row of a
verification needs a mask of its own, filled after the drafts that the row has read.
Leans on vllm/v1/structured_output/__init__.py (grammar_bitmask:330, accept_tokens:462).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from vllm.v1.core.sched.output import GrammarOutput

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.v1.request import Request
    from vllm.v1.structured_output import StructuredOutputManager


def can_draft(request: Request, manager: StructuredOutputManager) -> bool:
    """Whether drafts can be taken back from the request's grammar.

    xgrammar rolls back without limit; the other backends keep no or little history. A reasoning
    parser latches its state outside of the grammar, so it cannot be rolled back either.
    """
    if not request.use_structured_output:
        return True
    grammar = request.structured_output_request.grammar
    return type(grammar).__name__ == "XgrammarGrammar" and manager._get_reasoner(request) is None


def advance(request: Request, token: int) -> int | None:
    """By how many steps the request's grammar moves on with a draft; None: it does not allow it.

    0 behind the end of a grammar, where a request with ignore_eos goes on unconstrained: what was
    no step must not be taken back, either.
    """
    if not request.use_structured_output:
        return 0
    grammar = request.structured_output_request.grammar
    before = grammar.num_processed_tokens
    if not grammar.accept_tokens(request.request_id, [token]):
        return None
    return grammar.num_processed_tokens - before


def roll_back(request: Request, steps: int) -> None:
    """Take `steps` drafts back from the request's grammar."""
    if steps:
        request.structured_output_request.grammar.rollback(steps)


def row_masks(
    request: Request, drafts: Sequence[int], rows: range, manager: StructuredOutputManager
) -> np.ndarray:
    """Bit masks int32 [len(rows), ceil(vocabulary / 32)] for rows that have read `drafts`."""
    ahead = 0
    for token in drafts[: rows.start]:
        if (steps := advance(request, token)) is None:
            break
        ahead += steps
    masks = manager.grammar_bitmask(
        {request.request_id: request},
        [request.request_id],
        {request.request_id: list(drafts[rows.start : rows.stop - 1])},
    )
    roll_back(request, ahead)
    return np.array(masks[: len(rows)])  # the manager reuses its buffer


def add_rows(
    base: GrammarOutput | None, shadow_ids: Sequence[str], masks: np.ndarray
) -> GrammarOutput:
    """`base` with one more mask per shadow. `base` must own its masks."""
    ids = list(shadow_ids)
    if base is None:
        return GrammarOutput(ids, masks, [0] * len(ids))
    return GrammarOutput(
        base.structured_output_request_ids + ids,
        np.concatenate([base.grammar_bitmask, masks]),
        [*(base.num_acceptable_drafts or ()), *([0] * len(ids))],
    )
