# SPDX-License-Identifier: Apache-2.0
"""Requests that wait for their KV and hold the whole cache between them: every one gets on."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from scheduler_cases import case, same, tokens

if TYPE_CHECKING:
    from scheduler_harness import Harness

BLOCK = 32  # scheduler_harness.BLOCK_SIZE
MOST = 24  # output tokens: within one block more than the prompt's, or just beyond


def _prompts(h: Harness, *lengths: int) -> list[str]:
    """Names of prompts that share no prefix."""
    names = []
    for number, length in enumerate(lengths):
        rng = random.Random(f"{number}/{length}")
        name = f"full-{number}-{length}"
        h.prompts[name] = [rng.randrange(258, 500) for _ in range(length)]
        names.append(name)
    return names


@contextmanager
def _blocks_left(h: Harness, blocks: int) -> Iterator[None]:
    held = h.pool.get_new_blocks(h.pool.get_num_free_blocks() - blocks)
    try:
        yield
    finally:
        h.pool.free_blocks(held)


def _fill(h: Harness, lengths: tuple[int, ...], transfers: list[dict[str, Any]], more: int) -> int:
    """Load all prompts at once into a cache of their blocks and `more`; each says what it says
    alone. Returns how many emitted the prefill's token."""
    names = _prompts(h, *lengths)
    references = [h.reference(name, max_tokens=MOST) for name in names]
    for name in names:
        h.save(name)
    with _blocks_left(h, sum(-(-length // BLOCK) for length in lengths) + more):
        requests = [
            h.lynx(name, first=reference.token_ids[0], max_tokens=MOST, **transfer)
            for name, reference, transfer in zip(names, references, transfers, strict=True)
        ]
        outputs = h.run()
    for request, reference in zip(requests, references, strict=True):
        same(outputs[request], reference)
    count = len(h.events("first_token"))
    h.settle()
    return count


@case
def full_cache_of_whole_blocks(h: Harness) -> None:
    exact = {"bits": 32, "anchor": 4, "residual": 4, "blocking": True}
    for transfer in (exact, {"anchor": 3, "residual": 9}):
        for more in (0, 1, 4):
            assert _fill(h, (128,) * 4, [transfer] * 4, more) == more


@case
def full_cache_beside_whole_blocks(h: Harness) -> None:
    transfers = [{"anchor": 3, "residual": 9}] * 4
    assert _fill(h, (127,) * 4, transfers, 0) == 4
    assert _fill(h, (129,) * 4, transfers, 0) == 4
    assert _fill(h, (128, 127, 128, 129), transfers, 0) == 2


@case
def full_cache_of_all_kinds(h: Harness) -> None:
    """Waiting ones, drafting ones, ones that pause, ones that are lost, at different times."""
    exact = {"bits": 32, "anchor": 6, "residual": 6, "blocking": True}
    drafting = {"anchor": 2, "residual": 20}
    late = {"anchor": 9, "residual": 12, "first_delay": 5}
    lost = {"anchor": 4, "lose_anchor": True}
    failed = {"anchor": 2, "fail": True, "residual": 8}
    for transfers in (
        [exact, drafting, late, exact],
        [drafting] * 4,
        [lost, exact, drafting, late],
        [late, lost, lost, exact],
        [failed, exact, lost, drafting],
    ):
        for more in (0, 2) if not h.v2 else (0,):
            _fill(h, (128, 96, 128, 64), transfers, more)


@case
def lost_load_does_not_hold_up_those_that_landed(h: Harness) -> None:
    """Others take the blocks that it has given back: it waits for new ones behind no queue."""
    lost, other = _prompts(h, 128, 80)
    references = [h.reference(name, max_tokens=MOST) for name in (lost, other)]
    scheduler = h.scheduler
    promote = scheduler._update_waiting_for_remote_kv
    taken: list[Any] = []
    finished: list[str] = []

    def take_all(request: Any) -> None:
        promote(request)
        if not request.num_computed_tokens and not taken:
            taken.extend(h.pool.get_new_blocks(h.pool.get_num_free_blocks()))

    scheduler._update_waiting_for_remote_kv = take_all
    try:
        names = [
            h.lynx(lost, anchor=3, lose_anchor=True, blocking=True, max_tokens=MOST),
            h.lynx(other, anchor=6, residual=6, bits=32, blocking=True, max_tokens=4),
        ]
        for _ in range(200):
            for output in h.step():
                finished += [output.request_id] if output.finished else []
                last = output
            if finished:
                break
    finally:
        del scheduler._update_waiting_for_remote_kv
        h.pool.free_blocks(taken)
    assert finished == [names[1]], finished
    assert tokens(last) == list(references[1].token_ids)[:4]
    same(h.run()[names[0]], references[0])
