# SPDX-License-Identifier: Apache-2.0
"""Structured output: grammars mask the rows of a verification."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .registry import case, same
from .sampling import equal

if TYPE_CHECKING:
    from ..harness import Harness


def regex(pattern: str, ignore_eos: bool = False) -> dict[str, Any]:
    from vllm.sampling_params import StructuredOutputsParams

    return {"structured_outputs": StructuredOutputsParams(regex=pattern), "ignore_eos": ignore_eos}


@case
def structured_output(h: Harness) -> None:
    reference = equal(h, "B", **regex("[a-h]{6}-([0-9]{4}|[x-z]{9})(,[p-w]{2})+"))
    assert reference.text[6] == "-"


@case
def structured_output_that_ends_before_the_drafts(h: Harness) -> None:
    """With ignore_eos a request goes on, unconstrained, behind the end of its grammar."""
    reference = equal(h, "B", **regex("[a-h]{6}", ignore_eos=True))
    assert len(reference.token_ids) > 20


@case
def structured_output_in_a_mixed_batch(h: Harness) -> None:
    """Masks of ordinary grammar requests survive those of the rows in the same step."""
    one, two = regex("[a-h]{14}-[0-9]{20}"), regex("[i-p]{12}=[q-z]{24}")
    references = h.reference("A", **one), h.reference("B", **two), h.reference("C")
    names = h.lynx("A", residual=14, **one), h.add("B", **two), h.add("C")
    outputs = h.run()
    for name, reference in zip(names, references, strict=True):
        same(outputs[name], reference)
    assert h.verified()["drafted"] > 3
