# SPDX-License-Identifier: Apache-2.0
"""What all tests share."""

import pytest

from lynx_connector.transport.loop import TransportLoop


@pytest.fixture(scope="session")
def ucx_loop():
    """The transport loop of the test process: UCX has one context per process."""
    loop = TransportLoop("tcp,self")
    loop.start()
    yield loop
    loop.stop()


@pytest.fixture(scope="session")
def flavour_runs(request, tmp_path_factory):
    """The runs of `tests/scheduler`, not begun, with the cases that this session selected."""
    from tests.scheduler.flavour_runs import FlavourRuns

    selected = {}
    for item in request.session.items:
        if getattr(item, "originalname", "") == "test_case":
            flavour, case = item.callspec.params["flavour"], item.callspec.params["case"]
            selected.setdefault(flavour, []).append(case)
    runs = FlavourRuns(tmp_path_factory.mktemp("scheduler"), selected)
    yield runs
    runs.close()


def is_wanted(request, fixture):
    """True where a test of this session asks for the fixture."""
    return any(fixture in getattr(item, "fixturenames", ()) for item in request.session.items)
