# SPDX-License-Identifier: Apache-2.0
"""Mooncake's handoff over real HTTP, between the two scheduler halves."""

import http.server
import threading
import time

import httpx
import pytest

from lynx_connector.config import LynxConfig
from lynx_connector.consumer.bootstrap import BootstrapClient
from lynx_connector.consumer.scheduler import ConsumerScheduler
from lynx_connector.engine.metadata import LynxMetadata
from lynx_connector.errors import ConfigError, TransferError
from lynx_connector.plan.planner import Planner
from lynx_connector.producer.bootstrap import MAX_REMEMBERED, BootstrapServer
from lynx_connector.producer.scheduler import ProducerScheduler
from lynx_connector.transport import ports
from lynx_connector.wire.handoff import MooncakeLeg, handoff_proof
from lynx_connector.wire.secrets import SharedSecrets
from tests.unit.objects import (
    BLOCK,
    NO_EVENTS,
    SHAPE,
    Status,
    admit,
    blocks,
    ended,
    filled,
    request,
    step,
)

WAIT = 0.5
A, B = b"a" * 32, b"b" * 32


@pytest.fixture
def server():
    server = BootstrapServer(0, "engine")
    yield server
    server.stop()


@pytest.fixture
def client():
    client = BootstrapClient(WAIT)
    yield client
    client.stop()


@pytest.fixture
def producer(server):
    config = LynxConfig(codec="hadamard")
    planner = Planner(False, SHAPE, "gpu")
    half = ProducerScheduler(
        config, "engine", "10.0.0.1", 1, BLOCK, NO_EVENTS, planner, bootstrap=server
    )
    half.set_workers([7600], [""])
    return half


@pytest.fixture
def consumer():
    config = LynxConfig(bootstrap_wait_seconds=WAIT)
    half = ConsumerScheduler(config, True, False, True, 1, BLOCK, NO_EVENTS, 1000)
    yield half
    half.stop()


def prefill_leg(name="x"):
    return {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": name}


def decode_leg(server, name="x", engine="engine"):
    return {
        "do_remote_decode": False,
        "do_remote_prefill": True,
        "transfer_id": name,
        "remote_engine_id": engine,
        "remote_bootstrap_addr": f"http://127.0.0.1:{server.port}",
    }


def start(half, name="x", request_id="p"):
    one = request(request_id, params=prefill_leg(name))
    half.add(one)
    filled(half, step(new=[(request_id, range(4), 0, 50)]))
    return one


def settled(half, one, seconds=30.0):
    """Ask as vLLM's scheduler does, step after step."""
    deadline = time.monotonic() + seconds
    while (answer := half.match(one, 0)) == (None, False):
        assert time.monotonic() < deadline, "not settled"
        time.sleep(0.01)
    return answer


def cause_of(half, name="r"):
    return half._decodes[name].failure


def test_query_has_mooncakes_shape(server, producer):
    reply = httpx.get(f"http://127.0.0.1:{server.port}/query", trust_env=False).json()
    assert reply == {"0": {"engine_id": "engine", "worker_addr": {"0": {"0": "10.0.0.1:7600"}}}}


@pytest.mark.parametrize("first", ["prefill", "decode"])
def test_legs_meet_in_any_order(server, producer, consumer, first):
    one = request(params=decode_leg(server))
    prefill = start(producer) if first == "prefill" else None
    consumer.add(one)
    assert consumer.match(one, 0) == (None, False)
    time.sleep(0.05)
    prefill = prefill or start(producer)
    time.sleep(2 * WAIT)  # a prefill leg that has come may wait for its turn without a limit
    assert consumer.match(one, 0) == (None, False)
    reply = producer.reply_early(prefill)
    assert settled(consumer, one) == (100, True)
    consumer.allocated(one, blocks(7), 100)
    metadata = LynxMetadata()
    consumer.fill(metadata, {})
    (load,) = metadata.loads
    assert load.transfer_id == reply["remote_request_id"]
    assert (load.host, load.ports, load.codec) == ("10.0.0.1", [7600], "hadamard")


def test_late_reply_is_published_at_its_end(server, producer, consumer):
    one = request(params=decode_leg(server))
    consumer.add(one)
    ended(producer, start(producer))
    assert settled(consumer, one) == (100, True)


def test_decode_leg_without_a_prefill_leg(server, consumer):
    one = request(params=decode_leg(server))
    began = time.monotonic()
    consumer.add(one)
    assert settled(consumer, one) == (0, False)
    assert WAIT <= time.monotonic() - began < WAIT + 8  # the default is 10 s
    assert "no prefill leg with transfer_id 'x'" in cause_of(consumer)


def test_prefill_that_failed(server, producer, consumer):
    one = request(params=decode_leg(server))
    consumer.add(one)
    ended(producer, start(producer), Status.FINISHED_ABORTED)
    assert settled(consumer, one) == (0, False)
    assert "FINISHED_ABORTED" in cause_of(consumer)


def test_transfer_id_of_two_prefill_legs(server, producer, consumer):
    """The second leg ends with an error, and its decode leg does not get the first one's KV."""
    producer.reply_early(start(producer, request_id="first"))
    start(producer, request_id="second")
    assert producer.take_refused() == ["second"]
    assert producer.num_prefills == 1
    other = request(params=decode_leg(server))
    other.prompt_token_ids = [9] * 100
    consumer.add(other)
    assert settled(consumer, other) == (0, False)
    assert "another prompt" in cause_of(consumer)


def test_transfer_id_of_two_decode_legs(server, producer, consumer):
    first, second = (request(n, params=decode_leg(server)) for n in "ab")
    consumer.add(first)
    consumer.add(second)
    assert consumer.match(second, 0) == (0, False)
    assert "already used by request a" in cause_of(consumer, "b")


@pytest.mark.parametrize("name", ["", 5, "x" * 129])
def test_transfer_ids_that_are_none(producer, name):
    one = request("p", params=prefill_leg(name))
    producer.add(one)
    assert producer.take_refused() == ["p"]


def test_engine_that_is_not_the_routers(server, producer, consumer):
    producer.reply_early(start(producer))
    one = request(params=decode_leg(server, engine="other"))
    consumer.add(one)
    assert settled(consumer, one) == (0, False)
    assert "wants 'other'" in cause_of(consumer)


def test_request_that_ends_while_its_handoff_is_unknown_gives_the_transfer_back(
    server, producer, consumer
):
    one = request(params=decode_leg(server))
    consumer.add(one)
    consumer.finish(one)
    assert consumer.has_orphans
    reply = producer.reply_early(start(producer))
    deadline = time.monotonic() + 30
    releases = []
    while consumer.has_orphans and time.monotonic() < deadline:
        metadata = LynxMetadata()
        consumer.fill(metadata, {})
        releases += metadata.releases
    assert [release.transfer_id for release in releases] == [reply["remote_request_id"]]


def test_full_local_hit_does_not_wait(server, producer, consumer):
    one = request(params=decode_leg(server))
    consumer.add(one)
    assert admit(consumer, one, local=99)[0] == 0
    assert consumer.has_orphans


@pytest.mark.parametrize(
    ("status", "body", "cause"),
    [
        (200, b"<html>", "malformed answer"),
        (200, b'{"state": "soon"}', "malformed answer"),
        (200, b'{"state": "ready"}', "is engine None"),
        (200, b" " * (1 << 17), "too long"),
        (404, b"{}", "HTTP status 404"),
    ],
)
def test_bootstrap_that_answers_nonsense(client, status, body, cause):
    class Nonsense(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    rogue = http.server.HTTPServer(("127.0.0.1", 0), Nonsense)
    threading.Thread(target=rogue.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{rogue.server_port}"
        with pytest.raises(TransferError, match=cause) as error:
            client.resolve(MooncakeLeg("x", "engine", address)).result(30)
        assert address in str(error.value)
    finally:
        rogue.shutdown()
        rogue.server_close()


def test_nobody_listens(client):
    with pytest.raises(TransferError, match=r"127\.0\.0\.1:9"):
        client.resolve(MooncakeLeg("x", "engine", "http://127.0.0.1:9")).result(30)


@pytest.mark.parametrize("address", ["ftp://a", "http://a/b", "127.0.0.1:9", 5])
def test_malformed_bootstrap_address(server, consumer, address):
    one = request(params=decode_leg(server) | {"remote_bootstrap_addr": address})
    consumer.add(one)
    assert settled(consumer, one) == (0, False)
    assert "remote_bootstrap_addr" in cause_of(consumer)


def test_port_in_use_is_named(server, monkeypatch):
    monkeypatch.setattr(ports, "PORT_SECONDS", 0.2)
    with pytest.raises(ConfigError, match=f"bootstrap_port = {server.port}"):
        BootstrapServer(server.port, "engine")


def test_what_is_remembered_is_bounded(server):
    for i in range(MAX_REMEMBERED + 10):
        assert server.expect(str(i))
    assert len(server._answers) == MAX_REMEMBERED


@pytest.mark.parametrize(
    "address",
    ["http://[::1", "http://xn--zz", "http://a:99999", "http://a..b", "http://a:b", "http://[x]:1"],
)
def test_an_address_that_is_none_fails_its_request_alone(client, address):
    """httpx raises what is not among its own errors."""
    with pytest.raises(TransferError, match="bootstrap http"):
        client.resolve(MooncakeLeg("x", "engine", address)).result(60)


@pytest.mark.parametrize(
    "body",
    [
        b'{"state":"ready","handoff":{"a":' + b"[" * 60_000 + b"}}",
        b'{"state":"ready","x":' + b"[" * 60_000 + b"}}",
        b'{"state":"failed","cause":"\xff"}',
        b'{"state":"ready\xff"}',
        b'{"state":"failed","cause":"' + b"x" * 60_000 + b'"}',
        b'{"state":"failed","cause":"a\\u0000\\nb"}',
        b'{"state":"ready","handoff":{"remote_engine_id":"' + b"x" * 60_000 + b'"}}',
    ],
    ids=lambda body: repr(body[:30]),
)
def test_an_answer_that_is_none_fails_its_request_alone(client, body):
    class Nonsense(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    rogue = http.server.HTTPServer(("127.0.0.1", 0), Nonsense)
    threading.Thread(target=rogue.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{rogue.server_port}"
        with pytest.raises(TransferError) as error:
            client.resolve(MooncakeLeg("x", "engine", address)).result(30)
        assert str(error.value).isprintable() and len(str(error.value)) < 600
    finally:
        rogue.shutdown()
        rogue.server_close()


@pytest.mark.parametrize(
    ("prefill", "decode", "proved"),
    [((A,), (A,), True), ((B, A), (A, B), True), ((A,), (B,), False), ((), (A,), False),
     ((A,), (), True)],
)  # fmt: skip
def test_with_a_secret_answers_are_proved(prefill, decode, proved):
    server = BootstrapServer(0, "engine", secrets=SharedSecrets(values=prefill))
    client = BootstrapClient(WAIT, SharedSecrets(values=decode))
    server.publish("t", {"remote_engine_id": "engine", "lynx": {"first_token": 7}})
    leg = MooncakeLeg("t", "engine", f"http://127.0.0.1:{server.port}")
    answer = client.resolve(leg)
    if proved:
        assert answer.result(10)["lynx"] == {"first_token": 7}
    else:
        with pytest.raises(TransferError, match="not proved with the shared secret"):
            answer.result(10)
    client.stop()
    server.stop()


def test_a_proof_goes_with_one_transfer_and_all_of_its_handoff():
    handoff = {"remote_engine_id": "engine", "lynx": {"first_token": 7, "ports": [1, 2]}}
    proof = handoff_proof(A, "t", handoff)
    assert proof == handoff_proof(A, "t", dict(reversed(handoff.items())))
    others = [
        (B, "t", handoff),
        (A, "u", handoff),
        (A, "t", handoff | {"lynx": {"first_token": 8, "ports": [1, 2]}}),
        (A, "t", handoff | {"more": None}),
    ]
    assert proof not in {handoff_proof(*other) for other in others}
