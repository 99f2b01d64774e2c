# SPDX-License-Identifier: Apache-2.0
"""The short form of `make soak`: three minutes, one prefill and one decode instance.

Two cores do not start four servers in the time of a test run; both instances meet every fault.
"""

import pytest

from tests.soak import kinds, report
from tests.soak.run import Settings, soak

pytest.importorskip("vllm")


@pytest.mark.integration
@pytest.mark.timeout(1500)
def test_three_minutes_of_everything(tmp_path):
    settings = Settings(
        tmp_path,
        minutes=3,
        prefills=1,
        decodes=1,
        kinds=kinds.choose([], []),
        fault_every=15,
        # A busy machine may answer few requests: how many is not for a test to say.
        wanted_a_minute=1,
    )
    found = soak(settings)
    missed = [goal for goal in found["goals"] if goal["met"] is False]
    assert not missed, report.text(found)
    met = set(found["transport_faults"])
    assert met, "no frame met a fault"
    assert found["server_faults"], "no server met a fault"
