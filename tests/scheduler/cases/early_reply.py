# SPDX-License-Identifier: Apache-2.0
"""Prefills of two chunks that are answered after their first one, on every flavour."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .registry import case, same, tokens

if TYPE_CHECKING:
    from ..harness import Harness

LENGTH = 300  # a step computes 256 tokens


def _prefill(h: Harness, reply: str | None) -> tuple[str, Any]:
    """Add a prefill and run until the front end is done with it: (engine's id, last output)."""
    h.prompts["LONG"] = [258 + i * i % 240 for i in range(LENGTH)]
    name = h.add("LONG", {"save": f"long-{reply}", "reply": reply}, max_tokens=1)
    output = h.run()[name]
    return next(rid for rid in h.scheduler.requests if rid.startswith(name)), output


def _drain(h: Harness) -> None:
    for _ in range(20):
        if not h.scheduler.requests:
            return
        h.core.step_fn()
    raise AssertionError(f"stuck: {h.scheduler.requests}")


@case
def answered_early_and_prefilled_to_its_end(h: Harness) -> None:
    reference = h.reference("A")
    request_id, output = _prefill(h, "early")
    request = h.scheduler.requests[request_id]
    assert not request.is_finished()
    assert request.num_output_tokens == 0
    (got,) = output.outputs
    assert (list(got.token_ids), got.text, got.finish_reason) == ([], "", "length")
    assert output.kv_transfer_params["do_remote_prefill"]
    assert output.kv_transfer_params["remote_prefill_cached_tokens"] == 0
    other = h.add("A")  # beside the rest of the prefill
    same(h.run()[other], reference)
    _drain(h)
    assert request.num_output_tokens == 1
    assert h.connector.early_replies.ended[request_id] == "FINISHED_LENGTH_CAPPED"


@case
def the_end_of_a_prefill_is_computed_in_the_chunks_that_are_asked_for(h: Harness) -> None:
    replies = h.connector.early_replies
    replies.chunks.clear()
    replies.chunk = 16
    request_id, _ = _prefill(h, "early")
    _drain(h)
    replies.chunk = 0
    # 300 tokens: a first chunk of 256, then as asked
    assert replies.chunks == [(44, 256), (28, 256), (12, 256)], replies.chunks
    assert h.scheduler.max_num_scheduled_tokens == 256
    assert replies.ended[request_id] == "FINISHED_LENGTH_CAPPED"


@case
def a_prefill_beside_another_request_is_not_held_back(h: Harness) -> None:
    replies = h.connector.early_replies
    _prefill(h, "early")
    asked = len(replies.chunks)
    h.add("A")
    h.core.step_fn()
    assert len(replies.chunks) == asked
    h.run()
    _drain(h)


@case
def given_up_after_its_early_reply(h: Harness) -> None:
    request_id, _ = _prefill(h, "unwanted")
    request = h.scheduler.requests[request_id]
    _drain(h)
    assert request.num_output_tokens == 0
    assert h.connector.early_replies.ended[request_id] == "FINISHED_ABORTED"


@case
def refused_prefill_ends_with_an_error(h: Harness) -> None:
    name = h.add("A", {"save": "refused", "reply": "refused"}, max_tokens=1)
    assert h.run()[name].outputs[0].finish_reason == "error"
    _drain(h)


@case
def prefill_of_one_chunk_is_answered_by_its_end(h: Harness) -> None:
    name = h.add("A", {"save": "short", "reply": "early"}, max_tokens=1)
    assert len(tokens(h.run()[name])) == 1
    h.connector.early_replies.waiting.clear()
    _drain(h)
