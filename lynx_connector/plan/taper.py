# SPDX-License-Identifier: Apache-2.0
"""How a streamed prefill ends: in chunks that get smaller.

What has to travel after a prefill is its last chunk, however long the prompt was. Every chunk costs
a pass over the weights, though; so the end is halved only as often as that brings the last byte
forward.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

MIN_CHUNK = 32
"""A smaller chunk would be little more than the tokens that travel uncompressed."""

MOST_HALVINGS = 5

MIN_GAIN = 0.5
"""Passes by which the last byte must come sooner, since what was measured is not exact."""


@dataclass(frozen=True)
class Pace:
    """pass_s: seconds of a forward pass besides what its tokens cost; token_s: seconds that a token
    adds to it; wire_s: seconds that a token's tiers take on the link."""

    pass_s: float
    token_s: float
    wire_s: float

    def landed(self, before: float, chunks: Sequence[float]) -> float:
        """Seconds until the last byte has landed, from the start of the first chunk. Each chunk
        travels once it is computed, behind those before it and `before` tokens of earlier ones."""
        computed, landed = 0.0, before * self.wire_s
        for tokens in chunks:
            computed += self.pass_s + tokens * self.token_s
            landed = max(landed, computed) + tokens * self.wire_s
        return landed


@dataclass
class Unsent:
    """Computed tokens of one prompt that, by the link's rate, are still under way.

    left: tokens of the prompt that are not computed yet, at `since` (seconds of any clock).
    """

    left: int
    since: float
    tokens: float = 0.0

    def update(self, left: int, now: float, wire_s: float) -> float:
        """What is under way now that `left` tokens are left to compute: more than before after a
        preemption, whose tokens are not sent again."""
        sent = (now - self.since) / wire_s
        self.tokens = max(self.tokens - sent, 0.0) + max(self.left - left, 0)
        self.left, self.since = left, now
        return self.tokens


def next_chunk(left: int, most: int, pace: Pace, before: float, block_size: int = 1) -> int:
    """Tokens to compute next of the `left` last ones of a prompt, at most `most`, when `before`
    tokens are still under way.

    A whole number of blocks, unless it is all that is left or `most`.
    """
    whole = min(left, most)
    if left > 2 * most:
        return whole
    times = [(pace.landed(before, end), end) for end in _ends(left, most, block_size)]
    soonest, best = min(times)
    return best[0] if times[0][0] - soonest > MIN_GAIN * pace.pass_s else whole


def expected_landed(left: float, pace: Pace) -> float:
    """`Pace.landed` of the best of up to `MOST_HALVINGS` halvings on an idle link.

    In fractions of a token, so that predictions are smooth.
    """
    halvings = range(MOST_HALVINGS + 1)
    ends = ([left / 2**i for i in range(1, n + 1)] + [left / 2**n] for n in halvings)
    return min(pace.landed(0, end) for end in ends)


def _ends(left: int, most: int, block_size: int) -> Iterator[list[int]]:
    """Ways to divide `left` tokens: in whole chunks, then halved once, twice and so on."""
    yield [most] * (left // most) + ([left % most] if left % most else [])
    halves: list[int] = []
    while left >= 2 * MIN_CHUNK:
        half = min(-(-left // 2 // block_size) * block_size, most)
        if half >= left:
            return
        halves, left = [*halves, half], left - half
        yield [*halves, left]
