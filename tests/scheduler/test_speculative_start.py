# SPDX-License-Identifier: Apache-2.0
"""Runs the cases of `cases/` on every flavour of vLLM's engine.

One subprocess per flavour (see `__main__.py`) runs all its cases and writes their results,
which become one test each. `-k v1-sync` and the like narrow the run down to a flavour.
"""

import pytest

pytest.importorskip("vllm")

from .cases import CASES
from .engine import FLAVOURS, VARIANTS
from .flavour_runs import FlavourRuns

STARTED_AS = [*FLAVOURS, *(f"{flavour}+{variant}" for flavour in FLAVOURS for variant in VARIANTS)]
PARAMETERS = [
    pytest.param(flavour, name, id=f"{flavour}-{name}")
    for flavour in STARTED_AS
    for name, case in CASES.items()
    if case.runs_on(flavour)
]


@pytest.mark.timeout(1500)  # the first one waits for its whole flavour
@pytest.mark.parametrize(("flavour", "case"), PARAMETERS)
def test_case(flavour: str, case: str, flavour_runs: FlavourRuns) -> None:
    result = flavour_runs.get(flavour, case)
    assert result["ok"], result["detail"]
