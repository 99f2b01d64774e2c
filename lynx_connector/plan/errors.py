# SPDX-License-Identifier: Apache-2.0
"""Numbers that no model or link can have."""

import math

from lynx_connector.errors import LynxError


class PlanError(LynxError, ValueError):
    """A number is impossible; the text names it."""


def require_positive(**numbers: float) -> None:
    """Raise PlanError for the first that is not a finite number above 0."""
    for name, value in numbers.items():
        if not (math.isfinite(value) and value > 0):
            raise PlanError(f"{name} = {value:g}: must be a finite number above 0")


def require_not_negative(**numbers: float) -> None:
    """Raise PlanError for the first that is not a finite number of 0 or more."""
    for name, value in numbers.items():
        if not (math.isfinite(value) and value >= 0):
            raise PlanError(f"{name} = {value:g}: must be a finite number, 0 or more")
