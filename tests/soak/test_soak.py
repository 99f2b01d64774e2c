# SPDX-License-Identifier: Apache-2.0
"""The short form of `make soak`: three minutes, with a rolling restart first and then faults."""

import pytest

from tests.soak import kinds, report
from tests.soak.faults import ROLL
from tests.soak.run import Settings, soak

pytest.importorskip("vllm")


@pytest.mark.integration
@pytest.mark.timeout(1500)
def test_three_minutes_of_everything(tmp_path):
    settings = Settings(
        tmp_path,
        minutes=3,
        kinds=kinds.choose([], []),
        pool=80,
        fault_every=10,
        rolling=1,
        # A busy machine may answer few requests: how many is not for a test to say.
        wanted_a_minute=1,
    )
    found = soak(settings)
    missed = [goal for goal in found["goals"] if goal["met"] is False]
    assert not missed, report.text(found)
    assert found["transport_faults"], "no frame met a fault"
    met = {window["what"] for window in found["server_faults"]}
    assert ROLL in met, "no server was restarted in turn"
    assert met - {ROLL}, "no server met a fault"
