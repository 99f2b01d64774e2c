# SPDX-License-Identifier: Apache-2.0
"""Which mode is soonest at which link rate."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from lynx_connector.plan.errors import PlanError, require_positive
from lynx_connector.plan.model import Mode, Setting, predict

RATES_A_DECADE = 100
"""A mode that is best over less than a hundredth of a decade may be passed over."""


@dataclass(frozen=True)
class Stretch:
    """From this link rate on, in Mbit/s, this mode is the best."""

    from_mbit: float
    mode: str


def best_mode(setting: Setting, modes: Sequence[Mode], token: int) -> Mode:
    """The mode whose token comes soonest; of equals the first."""
    return min(modes, key=lambda mode: predict(setting, mode).token_s(token))


def crossings(
    setting: Setting, modes: Sequence[Mode], token: int, low_mbit: float, high_mbit: float
) -> list[Stretch]:
    """The best mode from `low_mbit` to `high_mbit`: where each one begins to be best, ascending.

    The link rate of `setting` does not matter.

    Raises:
        PlanError: no modes, or rates that are no range.
    """
    require_positive(low_mbit=low_mbit, high_mbit=high_mbit, token=token)
    if not modes or low_mbit > high_mbit:
        raise PlanError(f"low_mbit = {low_mbit:g} is above high_mbit = {high_mbit:g}, or no modes")

    def best(log_rate: float) -> Mode:
        return best_mode(dataclasses.replace(setting, link_mbit=10**log_rate), modes, token)

    low, high = math.log10(low_mbit), math.log10(high_mbit)
    steps = max(1, math.ceil((high - low) * RATES_A_DECADE))
    found = [Stretch(low_mbit, best(low).name)]
    for number in range(steps):
        left = low + (high - low) * number / steps
        right = low + (high - low) * (number + 1) / steps
        name = best(right).name
        if name == found[-1].mode:
            continue
        while right - left > 1e-6:
            middle = (left + right) / 2
            if best(middle).name == found[-1].mode:
                left = middle
            else:
                right = middle
        found.append(Stretch(10**right, best(right).name))
    return found
