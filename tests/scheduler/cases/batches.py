# SPDX-License-Identifier: Apache-2.0
"""Lynx requests among others, and what the prefix cache holds of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .registry import case, same, tokens

if TYPE_CHECKING:
    from ..harness import Harness


@case
def mixed_batch(h: Harness) -> None:
    references = {p: h.reference(p) for p in "ABCDF"}
    names = {
        h.lynx("A", residual=12, bits=3): "A",
        h.lynx("B", residual=24, bits=2): "B",
        h.lynx("C", residual=12, bits=4): "C",
        h.add("D"): "D",
    }
    late: list[str] = []

    def on_step(i: int) -> None:
        if i == 11:
            late.append(h.add("F"))

    outputs = h.run(on_step)
    for name, prompt in names.items():
        same(outputs[name], references[prompt])
    same(outputs[late[0]], references["F"])
    assert len(h.events("verified")) == 3


@case
def sibling_while_drafting_and_after(h: Harness) -> None:
    reference = h.reference("A")
    sibling: list[str] = []
    cached: list[int] = []

    def on_step(i: int) -> None:
        if i == 8:
            cached.append(len(h.pool.cached_block_hash_to_block))
            sibling.append(h.add("A"))

    name = h.lynx("A", residual=24, bits=2)
    outputs = h.run(on_step)
    same(outputs[name], reference)
    same(outputs[sibling[0]], reference)
    assert cached == [0]
    assert outputs[sibling[0]].num_cached_tokens == 0
    after = h.add("A")
    output = h.run()[after]
    same(output, reference)
    assert output.num_cached_tokens == 96


@case
def only_refined_blocks_serve_as_prefix(h: Harness) -> None:
    reference = h.reference("A", max_tokens=72)
    for params in ({}, {"logprobs": 0}):
        name = h.lynx("A", residual=40, bits=3, max_tokens=72, **params)
        h.run()
        ids = list(reference.token_ids)
        after = h.add(h.prompts["A"] + ids[:60], max_tokens=12)
        output = h.run()[after]
        assert tokens(output) == ids[60:]
        assert output.num_cached_tokens >= 128
        assert name
        h.settle()


@case
def partial_local_hit(h: Harness) -> None:
    reference = h.reference("A")
    h.save("A")
    h.add(h.prompts["A"][:70], max_tokens=1)
    h.run()
    name = h.lynx("A", bits=2)
    output = h.run()[name]
    same(output, reference)
    assert h.verified()["drafted"] > 5
