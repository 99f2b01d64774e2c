# SPDX-License-Identifier: Apache-2.0
"""One running prefill/decode pair with a router for the whole session, and what tests ask of it.

The pair uses `klt`, the default, with tables learned before the first test, so that every request
of a test has the same; `test_tables.py` watches prefill servers of its own learn. The sender is
limited to LINK_MBIT, so that every transfer leaves time to draft. The decode instance recomputes
what it cannot load; a second one, for sessions with a test that needs it, fails such requests.
"""

import pytest

from lynx_connector.testbed.cluster import Cluster, Side, free_port
from lynx_connector.testbed.link import loopback
from lynx_connector.testbed.model import ensure_model
from tests.conftest import is_wanted

from .lone_servers import PREFILL_CHUNK, DecodeOnly
from .pair import Pair, transfer_flag

LINK_MBIT = 40


def pytest_collection_modifyitems(items):
    for item in items:
        if "integration" in item.path.parts:
            item.add_marker(pytest.mark.integration)


@pytest.fixture(scope="session", autouse=True)
def schedulers_beside(request):
    """Where `tests/scheduler` belongs to this session, too, it runs on what servers leave idle."""
    if is_wanted(request, "flavour_runs"):
        request.getfixturevalue("flavour_runs").begin(idle=True)


@pytest.fixture(scope="session")
def model():
    return ensure_model()


@pytest.fixture(scope="session")
def begun(request, model, tmp_path_factory):
    """The pair's cluster and the strict decode server: started, and not waited for.

    Start-up leaves cores idle, and so do tests: whoever asks for this early has it for nothing.
    """
    folder = tmp_path_factory.mktemp("pair")
    lynx = {
        "events_file": str(folder / "events-decode.jsonl"),
        "transfer_timeout_seconds": 20,
        "tables_dir": str(folder / "tables-decode"),
    }
    bootstrap = free_port()
    cluster = Cluster(
        model,
        folder,
        link=loopback(LINK_MBIT),
        dtype="float32",
        prefill=Side(
            lynx={
                "tables_dir": str(folder / "tables-prefill"),
                "learn_tokens": 2048,
                "plan": "fixed",
                "early_reply": False,  # a streamed transfer leaves no time to draft
                "bootstrap_port": bootstrap,
            },
            vllm_args=["--max-num-batched-tokens", str(PREFILL_CHUNK), "--served-model-name", "m"],
        ),
        decode=Side(
            vllm_args=[
                *transfer_flag("kv_consumer", "recompute", lynx),
                "--max-num-seqs",
                "12",
                "--served-model-name",
                "m",
                "--enable-prompt-tokens-details",
            ]
        ),
    )
    strict = DecodeOnly(model, tmp_path_factory.mktemp("strict"))
    with cluster:
        try:
            cluster.prefill.start()
            cluster.decode.start()
            if is_wanted(request, "strict_decode"):
                strict.server.start()
            yield cluster, bootstrap, strict
        finally:
            strict.server.stop()


@pytest.fixture(scope="session")
def pair(begun):
    cluster, bootstrap, _ = begun
    cluster.prefill.wait_ready(300)
    cluster.decode.wait_ready(300)
    cluster.router.start()
    cluster.router.wait_ready(30)
    pair = Pair(cluster, bootstrap)
    pair.learn()
    return pair


@pytest.fixture(scope="session")
def strict_decode(begun):
    """A decode instance of the same model with kv_load_failure_policy 'fail'."""
    strict = begun[-1]
    strict.server.wait_ready(300)
    return strict


@pytest.fixture(autouse=True)
def nothing_left(request):
    """After every test: no blocks, no staging bytes, no transfers, no spare endpoints."""
    yield
    if "pair" in request.fixturenames:
        request.getfixturevalue("pair").assert_idle()
