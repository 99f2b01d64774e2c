# SPDX-License-Identifier: Apache-2.0
"""Tiers beside a second connector, which stores and loads the KV of whole prompts, in either order.

The store keeps what the cache holds when a request is first scheduled: a request must not start on
a coarse cache there.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from .early_reply import _drain, _prefill
from .full_cache import _prompts
from .registry import case, same, tokens

if TYPE_CHECKING:
    from ..harness import Harness

MULTI = ("v1-sync+multi", "v1-sync+multi_last", "v1-async+multi")


def _exact(h: Harness, prompt: str) -> list[int]:
    """What an ordinary request says; its prompt is not in the store afterwards."""
    h.save(prompt)
    name = h.add(prompt)
    ids = tokens(h.run()[name])
    h.settle()
    _empty_store(h)
    return ids


def _empty_store(h: Harness) -> None:
    for folder in h.store.iterdir():
        shutil.rmtree(folder)


@case(flavours=MULTI)
def beside_a_store_all_is_loaded_before_the_first_step(h: Harness) -> None:
    other_reference = h.reference("C")
    (prompt,) = _prompts(h, 100)
    reference = _exact(h, prompt)
    for first in (None, reference[0]):
        _empty_store(h)
        transfer = {} if first is None else {"first": first}
        name, other = h.lynx(prompt, bits=2, residual=12, **transfer), h.add("C")
        outputs = h.run()
        assert tokens(outputs[name]) == reference
        same(outputs[other], other_reference)
        assert h.emissions[name][0] >= 12 or first is not None
        assert not h.events("drafting")
        assert len(h.events("first_token")) == (first is not None)
        h.settle()
    again = h.add(prompt)  # from the store, or computed here: never from a coarse cache
    assert tokens(h.run()[again]) == reference


@case(flavours=MULTI)
def beside_a_store_that_knows_the_prompt(h: Harness) -> None:
    """Whichever connector loads it, the other one is told that it need not."""
    reference = h.reference("A")
    for _ in range(2):
        name = h.lynx("A", bits=2, residual=9)
        same(h.run()[name], reference)
        h.settle()


@case(flavours=MULTI)
def beside_a_store_loads_are_lost(h: Harness) -> None:
    (prompt,) = _prompts(h, 90)
    reference = _exact(h, prompt)
    for transfer in (
        {"lose_anchor": True, "residual": 4},
        {"lose_anchor": True, "first": reference[0]},
    ):
        name = h.lynx(prompt, **transfer)
        assert tokens(h.run()[name]) == reference
        h.settle()


@case(flavours=MULTI)
def beside_a_store_prefills_are_answered_early(h: Harness) -> None:
    request_id, output = _prefill(h, "early")
    assert output.kv_transfer_params["do_remote_prefill"]
    _drain(h)
    assert h.connector.early_replies.ended[request_id] == "FINISHED_LENGTH_CAPPED"
