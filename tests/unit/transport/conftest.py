# SPDX-License-Identifier: Apache-2.0
"""What the tests of the transport share."""

import pytest

from .pair import Pair


@pytest.fixture
def loop(ucx_loop):
    return ucx_loop


@pytest.fixture
def pair(loop):
    pair = Pair(loop)
    yield pair
    pair.close()
