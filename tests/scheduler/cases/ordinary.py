# SPDX-License-Identifier: Apache-2.0
"""What a client sees of metrics, and requests without a transfer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .registry import case, same

if TYPE_CHECKING:
    from ..harness import Harness


@case
def metrics_count_what_was_emitted(h: Harness) -> None:
    reference = h.reference("A")
    name = h.lynx("A", residual=30, bits=8)
    output = h.run()[name]
    same(output, reference)
    assert output.metrics.num_generation_tokens == len(reference.token_ids)
    assert h.emissions[name][0] >= 29, "the first output comes with the verification"
    assert output.metrics.first_token_ts > 0


@case
def ordinary_requests_are_untouched(h: Harness) -> None:
    references = {p: h.reference(p, max_tokens=20) for p in "ABCDEF"}
    names = {h.add(p, max_tokens=20): p for p in "ABCDEF"}
    outputs = h.run()
    for name, prompt in names.items():
        same(outputs[name], references[prompt])
    assert not h.port.events
