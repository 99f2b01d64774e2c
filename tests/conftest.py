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
