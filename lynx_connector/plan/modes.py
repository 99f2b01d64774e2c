# SPDX-License-Identifier: Apache-2.0
"""The codecs of this product as modes: their widths on the wire, and how good their drafts are."""

import math
from dataclasses import dataclass

from lynx_connector.plan.errors import PlanError
from lynx_connector.plan.model import FirstToken, Mode, expected_accepted
from lynx_connector.plan.shape import KVShape

EXACT_TIER_BITS = {"bfloat16": 3.0, "float16": 6.0, "float32": 20.0}
"""Bits an element of the exact tier over an 8-bit cache (bf16 measured, the others estimated)."""

ACCEPTED_OF_24 = {
    ("hadamard", 4): 15.0,
    ("klt", 3): 14.0,
    ("klt", 4): 21.4,
    ("klt", 5): 22.7,
}
"""Greedy drafts of 24 that real KV confirmed, by codec and anchor bits (SmolLM2-135M, 40 starts;
3 and 5 bits were measured with fewer raw tokens or as a share of full runs, and are estimates)."""


@dataclass(frozen=True)
class Device:
    """How fast codecs are where the model runs, and what verifying one more draft costs."""

    codec_gb_s: float
    verify_cost: float


DEVICES = {
    # 2 ns an element; 32 and 64 drafts in 141 and 215 ms where a step takes 60 ms.
    "cpu": Device(codec_gb_s=1.0, verify_cost=0.045),
    # Limited by memory on both sides: the weights are read once for all drafts.
    "gpu": Device(codec_gb_s=100.0, verify_cost=0.003),
}


def mode_of(
    codec: str,
    shape: KVShape,
    *,
    anchor_bits: int = 4,
    exact: bool = False,
    drafts: bool = True,
    first_token: FirstToken = FirstToken.FINAL_CACHE,
    streamed: bool = False,
) -> Mode:
    """A codec of this product; `exact` adds the exact tier, `drafts` matters to two-tier codecs.

    Raises:
        PlanError: an unknown codec.
    """
    scale = 8 / shape.head_dim  # one byte a head vector
    if codec in ("hadamard", "klt"):
        tiers: tuple[float, ...] = (anchor_bits + scale, 8.0 - anchor_bits)
        name = f"klt{anchor_bits}" if codec == "klt" else codec
        if exact:
            name, tiers = name + "+exact", (*tiers, EXACT_TIER_BITS[shape.dtype])
        accepted = ACCEPTED_OF_24[codec, anchor_bits]
        acceptance = acceptance_of(accepted, 24)
        return Mode(name, tiers, drafts, acceptance, first_token, streamed)
    widths = {"bf16": float(shape.element_bits), "int8": 8 + 2 * scale, "int4": 4 + 2 * scale}
    if codec not in widths:
        raise PlanError(
            f"codec = {codec!r}: accepted values are hadamard, klt, {', '.join(widths)}"
        )
    return Mode(
        codec,
        (widths[codec],),
        first_token=first_token,
        streamed=streamed,
        encoded=codec != "bf16",
    )


def acceptance_of(accepted: float, drafted: float) -> float:
    """The acceptance that makes `accepted` of `drafted` drafts the expectation (0.01 % close).

    Raises:
        PlanError: not 0 <= accepted < drafted.
    """
    if not 0 <= accepted < drafted or not math.isfinite(drafted):
        raise PlanError(
            f"accepted = {accepted:g} of drafted = {drafted:g}: must be 0 or more, less"
        )
    low, high = 0.0, 1.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        if expected_accepted(middle, drafted) < accepted:
            low = middle
        else:
            high = middle
    return low
