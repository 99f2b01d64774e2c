# SPDX-License-Identifier: Apache-2.0
"""The plan of one request: how its KV is sent, chosen by the model from what was measured.

The candidates are the configured codec (of `klt` every anchor width) with the configured final
tier, and `bf16`, the plain copy. Both leave a cache at least as good as the one asked for; no other
codec is considered, since it would be another cache than the user chose.
"""

from dataclasses import dataclass

from lynx_connector.plan.model import Mode, Setting, predict, worthwhile_drafts
from lynx_connector.plan.modes import DEVICES, mode_of
from lynx_connector.plan.shape import KVShape

TARGET_TOKEN = 32
"""The plan that brings this token soonest is the best."""

NEGLIGIBLE = 0.01
"""Part of its time by which another plan may be slower than the best and yet be taken: the plain
copy first, since it changes no bit and needs no codec, then the configured one."""

DEFAULT_STEP_MS = 50.0
"""Decode step that is assumed until a decode instance has named its own."""

MAX_DRAFTS = 64


@dataclass(frozen=True)
class Wanted:
    """What the configuration asks for, with `klt` replaced where it has no tables yet."""

    codec: str
    anchor_bits: int
    final_tier: str


@dataclass(frozen=True)
class Measured:
    """What is known of the way to the decode instance; None: nothing yet."""

    link_mbit: float | None = None
    step_ms: float | None = None


@dataclass(frozen=True)
class Choice:
    """The plan chosen. name: short, for logs and metrics. draft_limit: 0 gives no hint. bits: of an
    element on the wire, all tiers."""

    name: str
    codec: str
    anchor_bits: int
    final_tier: str
    draft_limit: int
    why: str
    bits: float


def configured(wanted: Wanted, shape: KVShape, why: str) -> Choice:
    """The plan that follows the configuration."""
    mode = _mode(wanted, shape)
    return Choice(
        mode.name,
        wanted.codec,
        wanted.anchor_bits,
        wanted.final_tier,
        0,
        why,
        mode.total_bits,
    )


def choose(
    wanted: Wanted,
    shape: KVShape,
    tokens: int,
    measured: Measured,
    *,
    in_flight: int = 1,
    device: str = "gpu",
) -> Choice:
    """The plan that brings token 32 soonest, or within 1 % of it: the first such of the plain copy,
    the configured plan and the other anchor widths. As configured while nothing is measured.

    shape is one worker's, and `measured.link_mbit` the rate of its link, which `in_flight` requests
    share. device: a key of `DEVICES`.

    Raises:
        PlanError: an impossible number.
    """
    if measured.link_mbit is None:
        return configured(wanted, shape, "no link rate measured yet, as configured")
    costs = DEVICES[device]
    setting = Setting(
        shape,
        tokens,
        link_mbit=measured.link_mbit / max(1, in_flight),
        step_ms=measured.step_ms or DEFAULT_STEP_MS,
        codec_gb_s=costs.codec_gb_s,
        verify_cost=costs.verify_cost,
        draft_limit=MAX_DRAFTS,
    )
    options = _candidates(wanted, shape)
    seconds = [predict(setting, mode).token_s(TARGET_TOKEN) for _, mode in options]
    enough = min(seconds) * (1 + NEGLIGIBLE)
    best = next(index for index, time in enumerate(seconds) if time <= enough)
    chosen, mode = options[best]
    listed = ", ".join(
        f"{mode.name} {time:.2f} s" for (_, mode), time in zip(options, seconds, strict=True)
    )
    why = (
        f"token {TARGET_TOKEN} after {listed}; {tokens} tokens of {shape.bytes_per_token} B, "
        f"link {measured.link_mbit:.0f} Mbit/s for {in_flight}, step {setting.step_ms:.0f} ms"
        + ("" if measured.step_ms else " (assumed)")
    )
    return Choice(
        mode.name,
        chosen.codec,
        chosen.anchor_bits,
        chosen.final_tier,
        _draft_hint(setting, mode),
        why,
        mode.total_bits,
    )


def _candidates(wanted: Wanted, shape: KVShape) -> list[tuple[Wanted, Mode]]:
    """In order of preference."""
    found = [wanted]
    if wanted.codec == "klt":
        found += [
            Wanted("klt", bits, wanted.final_tier)
            for bits in (3, 4, 5)
            if bits != wanted.anchor_bits
        ]
    if wanted.codec != "bf16":
        found.insert(0, Wanted("bf16", wanted.anchor_bits, wanted.final_tier))
    return [(one, _mode(one, shape)) for one in found]


def _mode(wanted: Wanted, shape: KVShape) -> Mode:
    exact = wanted.final_tier == "exact"
    return mode_of(wanted.codec, shape, anchor_bits=wanted.anchor_bits, exact=exact)


def _draft_hint(setting: Setting, mode: Mode) -> int:
    """Most drafts that are worth their verification; 0 for a mode that has none."""
    if not mode.drafts:
        return 0
    return max(1, int(min(MAX_DRAFTS, worthwhile_drafts(mode.acceptance, setting.verify_cost))))
