# SPDX-License-Identifier: Apache-2.0
"""The time line of one request: prefill, transfer by tiers, drafts, verification, tokens.

Everything is an expected value and continuous (half a draft is allowed), so that predictions change
smoothly with what they depend on. With W the seconds that a tier's bytes take at the wire's rate:

    not streamed    landed = prefill + overhead + W(all tokens)
    streamed        landed = max(prefill + overhead + W(what is left of the last chunk),
                                 first chunk + overhead + W(all tokens))

The last chunk is computed in halves where that brings its last byte forward (`taper`).

A chunk is encoded whole before its first byte leaves, and decoded once its last one is there: an
encoded mode lands later by both. The anchor counts its own bytes, a finer tier those of all tiers
up to it, since they share the wire.

From the anchor on a draft is made every decode step, up to the draft limit. Once the final tier is
there, n drafts are verified in one pass of 1 + n * verify_cost steps, which yields the expected
number of accepted drafts and one token more; every later token takes a step. A mode without drafts
is the case n = 0.

Left out: waiting for other requests, packet loss, the moment until a running step ends, the growth
of a step with the context, and what decoding loses to patching.
"""

import enum
import math
from dataclasses import dataclass

from lynx_connector.plan.errors import PlanError, require_not_negative, require_positive
from lynx_connector.plan.shape import KVShape
from lynx_connector.plan.taper import Pace, expected_landed

RAW_TOKENS = 17
"""Tokens that travel uncompressed by default: the first one and the last 16."""


class FirstToken(enum.Enum):
    """Where the first token that a client sees comes from."""

    FINAL_CACHE = "final cache"
    """A step on the final cache."""
    HANDOVER = "handover"
    """The prefill sampled it and hands it over: it needs no KV."""
    DRAFT = "draft"
    """The first draft, unverified: how the paper counts, never how this product answers."""


@dataclass(frozen=True)
class Mode:
    """One way of sending KV. tier_bits: bits an element on the wire of each tier, coarsest first.

    acceptance: probability that a draft is right where those before it were.
    """

    name: str
    tier_bits: tuple[float, ...]
    drafts: bool = False
    acceptance: float = 0.0
    first_token: FirstToken = FirstToken.FINAL_CACHE
    streamed: bool = False
    encoded: bool = True
    """Whether a codec has work to do; a plain copy has not."""

    def __post_init__(self) -> None:
        if not self.tier_bits:
            raise PlanError(f"mode {self.name}: has no tiers")
        require_positive(tier_bits=min(self.tier_bits))
        if not 0 <= self.acceptance < 1:
            raise PlanError(f"acceptance = {self.acceptance:g}: must be 0 or more and below 1")

    @property
    def total_bits(self) -> float:
        """Bits an element of all tiers."""
        return sum(self.tier_bits)


@dataclass(frozen=True)
class Setting:
    """What a request meets. Raises PlanError, naming the number, where one is impossible.

    prefill_tokens_s None: the prompt is in the prefill's prefix cache, and computing it takes no
    time. codec_gb_s: KV in the cache's dtype that the slower of encoder and decoder takes in a
    second. verify_cost: part of a decode step by which one more draft lengthens a verification.
    """

    shape: KVShape
    tokens: int
    link_mbit: float
    step_ms: float
    prefill_tokens_s: float | None = None
    overhead_ms: float = 0.0
    chunk_tokens: int = 2048
    codec_gb_s: float = 100.0
    verify_cost: float = 0.003
    draft_limit: int = 64
    raw_tokens: int = RAW_TOKENS

    def __post_init__(self) -> None:
        require_positive(
            tokens=self.tokens,
            link_mbit=self.link_mbit,
            step_ms=self.step_ms,
            prefill_tokens_s=1 if self.prefill_tokens_s is None else self.prefill_tokens_s,
            chunk_tokens=self.chunk_tokens,
            codec_gb_s=self.codec_gb_s,
        )
        require_not_negative(
            overhead_ms=self.overhead_ms,
            verify_cost=self.verify_cost,
            draft_limit=self.draft_limit,
            raw_tokens=self.raw_tokens,
        )

    def prefill_s(self, tokens: int) -> float:
        """Seconds that computing so many tokens takes."""
        return tokens / self.prefill_tokens_s if self.prefill_tokens_s else 0.0

    def wire_bytes(self, bits: float, tokens: int) -> float:
        """Bytes of tiers of together `bits` an element, with the tokens that travel raw."""
        raw = min(self.raw_tokens, tokens)
        whole = self.shape.element_bits
        return self.shape.elements_per_token / 8 * (raw * whole + (tokens - raw) * bits)

    def codec_s(self, mode: Mode) -> float:
        """Seconds of encoding and decoding one chunk, which nothing hides."""
        chunk = min(self.chunk_tokens, self.tokens) * self.shape.bytes_per_token
        return 2 * chunk / (self.codec_gb_s * 1e9) if mode.encoded else 0.0

    def wire_rate(self, mode: Mode) -> float:
        """Bytes a second at which `mode` moves: the link's rate, or the codec's if lower."""
        link = self.link_mbit * 125e3
        if not mode.encoded:
            return link
        return min(link, self.codec_gb_s * 1e9 * mode.total_bits / self.shape.element_bits)


@dataclass(frozen=True)
class Prediction:
    """Seconds from the moment the prefill begins, and counts of one request."""

    mode: Mode
    anchor_s: float
    """The anchor of every token has landed."""
    final_s: float
    """Every tier has landed."""
    drafted: float
    accepted: float
    verified_s: float
    """The first step on the final cache is done; it yields `accepted` + 1 tokens."""
    first_s: float
    """Time to first token."""
    step_s: float
    wire_bytes: float

    def token_s(self, k: int) -> float:
        """Seconds until token k, counted from 1, can be shown.

        Raises:
            PlanError: k is below 1.
        """
        require_positive(token=k)
        if k == 1:
            return self.first_s
        handed_over = 1 if self.mode.first_token is FirstToken.HANDOVER else 0
        later = k - handed_over - (self.accepted + 1)
        return self.verified_s + max(0.0, later) * self.step_s


def predict(setting: Setting, mode: Mode) -> Prediction:
    """The time line of one request.

    It never gets earlier with more tokens or later with a faster link (tests/unit/plan).
    """
    step, rate = setting.step_ms / 1e3, setting.wire_rate(mode)
    overhead = setting.overhead_ms / 1e3
    prefilled = setting.prefill_s(setting.tokens) + overhead
    chunk = min(setting.chunk_tokens, setting.tokens) if mode.streamed else setting.tokens
    first_chunk = setting.prefill_s(chunk) + overhead
    codec = setting.codec_s(mode)

    def landed(bits: float) -> float:
        wire_s = setting.wire_bytes(bits, chunk) / rate
        last = prefilled + wire_s
        if mode.streamed:
            # prefill_tokens_s counts one pass; every halving is one more.
            computed = setting.prefill_s(chunk)
            pace = Pace(step, computed / chunk, wire_s / chunk)
            last = prefilled - computed - step + expected_landed(chunk, pace)
        return codec + max(last, first_chunk + setting.wire_bytes(bits, setting.tokens) / rate)

    anchor, final = landed(mode.tier_bits[0]), landed(mode.total_bits)
    drafted = min((final - anchor) / step, _limit(setting, mode)) if mode.drafts else 0.0
    accepted = expected_accepted(mode.acceptance, drafted)
    verified = final + step * (1 + setting.verify_cost * drafted)
    first = {
        FirstToken.FINAL_CACHE: verified,
        FirstToken.HANDOVER: prefilled,
        FirstToken.DRAFT: anchor + step if mode.drafts else verified,
    }[mode.first_token]
    size = setting.wire_bytes(mode.total_bits, setting.tokens)
    return Prediction(mode, anchor, final, drafted, accepted, verified, first, step, size)


def _limit(setting: Setting, mode: Mode) -> float:
    return min(setting.draft_limit, worthwhile_drafts(mode.acceptance, setting.verify_cost))


def expected_accepted(acceptance: float, drafts: float) -> float:
    """Drafts before the first wrong one: the sum of acceptance^i for i = 1 to `drafts`."""
    return acceptance * (1 - acceptance**drafts) / (1 - acceptance)


def worthwhile_drafts(acceptance: float, verify_cost: float) -> float:
    """Drafts of which the last one still saves as many steps as its verification costs.

    The n-th draft saves a step with probability acceptance^n.
    """
    if verify_cost <= 0:
        return math.inf
    if acceptance <= 0 or verify_cost >= acceptance:
        return 0.0
    return math.log(verify_cost) / math.log(acceptance)
