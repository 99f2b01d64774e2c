# SPDX-License-Identifier: Apache-2.0
"""Transfers that are lost, under both failure policies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .registry import case, same, tokens

if TYPE_CHECKING:
    from ..harness import Harness


@case
def residual_lost(h: Harness) -> None:
    reference, other_reference = h.reference("A"), h.reference("C")
    for params in ({"fail": True}, {"fail_early": True}, {"fail_early": True, "anchor": 1}):
        name, other = h.lynx("A", **params), h.add("C")
        outputs = h.run()
        same(outputs[name], reference)
        same(outputs[other], other_reference)
        assert [(e["cause"], e["policy"]) for e in h.events("fallback")] == [
            ("link lost", "recompute")
        ]
        assert not h.events("verified")
        h.settle()


@case
def anchor_lost(h: Harness) -> None:
    reference = h.reference("A")
    name = h.lynx("A", lose_anchor=True)
    same(h.run()[name], reference)
    assert [event["policy"] for event in h.events("fallback")] == ["recompute"]
    assert not h.events("drafting")


@case
def residual_lost_under_policy_fail(h: Harness) -> None:
    other_reference = h.reference("C")
    h.scheduler.recompute_kv_load_failures = False
    try:
        for params in ({"fail": True}, {"fail_early": True}, {"fail_early": True, "anchor": 9}):
            name, other = h.lynx("A", **params), h.add("C")
            outputs = h.run()
            assert tokens(outputs[name]) == []
            assert outputs[name].outputs[0].finish_reason == "error"
            same(outputs[other], other_reference)
            assert [event["policy"] for event in h.events("fallback")] == ["fail"]
            h.settle()
    finally:
        h.scheduler.recompute_kv_load_failures = True
