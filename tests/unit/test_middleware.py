# SPDX-License-Identifier: Apache-2.0
"""What HTTP clients of a front end with Lynx's middleware get, behind FastAPI as in vLLM."""

import json
from types import SimpleNamespace

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from starlette.responses import JSONResponse, StreamingResponse

from lynx_connector import middleware
from lynx_connector.engine import answers
from lynx_connector.engine.answers import Answers
from lynx_connector.middleware import LynxMiddleware
from tests.unit.objects import handoff

UNEXPLAINED = {
    "error": {
        "message": "Internal server error",
        "type": "InternalServerError",
        "param": None,
        "code": 500,
    }
}
FAILED = "KV transfer from h failed: silent (look)"


class FrontEnd:
    """A stand-in for vLLM's: each request ends as `outcome` says."""

    def __init__(self, policy="fail", role="kv_consumer", connector="LynxConnector", **lynx):
        self.seen = []
        self.outcome = "answer"
        app = FastAPI()
        app.state.vllm_config = SimpleNamespace(
            kv_transfer_config=SimpleNamespace(
                kv_connector=connector,
                kv_load_failure_policy=policy,
                is_kv_producer=role != "kv_consumer",
                is_kv_consumer=role != "kv_producer",
                kv_connector_extra_config=lynx,
            )
        )
        app.add_api_route("/v1/completions", self.completions, methods=["POST"])
        app.add_middleware(LynxMiddleware)
        self.client = TestClient(app)

    async def completions(self, raw_request: Request, body: dict):
        self.seen.append(body)
        raw_request.state.request_metadata = SimpleNamespace(request_id="cmpl-7")
        if body.get("stream"):
            return StreamingResponse(self.chunks(), media_type="text/event-stream")
        if self.outcome == "error":
            return JSONResponse(UNEXPLAINED, status_code=500)
        return JSONResponse({"choices": [{"text": "Internal server error"}]})

    async def chunks(self):
        yield f"data: {json.dumps({'choices': [{'text': 'Internal server error'}]})}\n\n"
        if self.outcome == "error":
            yield f"data: {json.dumps(UNEXPLAINED)}\n\n"
        yield "data: [DONE]\n\n"

    def post(self, params, outcome="error", **body):
        self.outcome = outcome
        body = {"prompt": "x"} | body
        if params is not None:
            body["kv_transfer_params"] = params
        return self.client.post("/v1/completions", json=body)


@pytest.fixture(autouse=True)
def heard(monkeypatch):
    fresh = Answers()
    fresh.counted = []
    fresh.count_refused = lambda role, code: fresh.counted.append((role, code))
    monkeypatch.setattr(middleware, "ANSWERS", fresh)
    monkeypatch.setattr(answers, "WAIT_SECONDS", 0.02)
    return fresh


# ---- causes --------------------------------------------------------------------------------------


def test_an_error_names_the_cause(heard):
    heard.explain("cmpl-7-0-0123abcd", FAILED)
    reply = FrontEnd().post(handoff())
    assert reply.status_code == 500
    assert reply.json()["error"] == UNEXPLAINED["error"] | {"message": FAILED}
    assert int(reply.headers["content-length"]) == len(reply.content)


def test_a_stream_ends_with_the_cause(heard):
    heard.explain("cmpl-7-0-0123abcd", FAILED)
    reply = FrontEnd().post(handoff(), stream=True)
    text, error, done = reply.text.strip().split("\n\n")
    assert json.loads(text[6:])["choices"][0]["text"] == "Internal server error"
    assert json.loads(error[6:])["error"] == UNEXPLAINED["error"] | {"message": FAILED}
    assert done == "data: [DONE]"


@pytest.mark.parametrize("stream", [False, True])
def test_other_errors_stay_as_they_are(stream):
    with_lynx = FrontEnd().post(handoff(), stream=stream)
    assert "Internal server error" in with_lynx.text
    assert with_lynx.status_code == (200 if stream else 500)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("params", "outcome"), [(handoff(), "answer"), (None, "answer"), (None, "error")]
)
def test_what_did_not_fail_passes_byte_for_byte(heard, params, stream, outcome):
    heard.explain("cmpl-7-0-0123abcd", FAILED)
    front = FrontEnd()
    reply = front.post(params, outcome, stream=stream)
    bare = FrontEnd()
    bare.client.app.user_middleware.clear()
    expected = bare.post(params, outcome, stream=stream)
    assert (reply.status_code, reply.content) == (expected.status_code, expected.content)
    assert reply.headers == expected.headers
    assert front.seen == bare.seen


# ---- malformed handoffs --------------------------------------------------------------------------

NOWHERE = [
    pytest.param({"remote_host": None}, "remote_host = None: expected str", id="null"),
    pytest.param({"remote_host": "a\x00b"}, r"remote_host = 'a\x00b': expected a host", id="nul"),
    pytest.param({"remote_request_id": "x" * (1 << 20)}, "remote_request_id = 'xxx", id="long"),
    pytest.param({"lynx": None}, "lynx = None: expected object", id="no-object"),
    pytest.param({"lynx": {"version": 4}}, "lynx.num_tokens is missing", id="missing"),
    pytest.param({"remote_host": [[1] * 9] * 9}, "remote_host = [[1, 1", id="list"),
    pytest.param({"remote_host": 10**18}, "remote_host = 1000000000000000000", id="number"),
]


@pytest.mark.parametrize(("change", "says"), NOWHERE)
@pytest.mark.parametrize("stream", [False, True])
def test_malformed_handoffs_are_refused_before_the_engine_sees_them(heard, change, says, stream):
    front = FrontEnd()
    reply = front.post(handoff() | change, stream=stream)
    assert reply.status_code == 400
    assert says in reply.text.replace("\\\\", "\\") and len(reply.text) < 600
    assert reply.json()["detail"].isprintable()
    assert front.seen == []
    assert heard.counted == [("consumer", "malformed")]


@pytest.mark.parametrize("stream", [False, True])
def test_the_engine_gives_back_what_a_malformed_handoff_names(heard, stream):
    front = FrontEnd()
    reply = front.post(handoff(final_tier="best"), stream=stream)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert "lynx.final_tier = 'best': expected one of residual, exact" in error["message"]
    assert error["code"] == 400
    assert len(front.seen) == 1
    assert heard.counted == []  # the engine counts it


def test_a_router_that_does_not_run_lynx_on_the_prefill_is_told():
    params = handoff()
    del params["lynx"]
    reply = FrontEnd().post(params)
    assert reply.status_code == 400 and "no key 'lynx'" in reply.text


PASSES = [
    pytest.param({"policy": "recompute"}, {"remote_host": None}, id="recomputed"),
    pytest.param({"connector": "MultiConnector"}, {"remote_host": None}, id="for-another"),
    pytest.param({}, {"lynx": {"version": 99}}, id="other-version"),
    pytest.param({"role": "kv_producer"}, {"remote_host": None}, id="no-consumer"),
]


@pytest.mark.parametrize(("config", "change"), PASSES)
def test_what_the_engine_may_answer_reaches_it(config, change):
    front = FrontEnd(**config)
    assert front.post(handoff() | change, "answer").status_code == 200
    assert len(front.seen) == 1


@pytest.mark.parametrize(
    "body",
    [
        b'{"kv_transfer_params": ',
        b'{"kv_transfer_params": 5}',
        b'["kv_transfer_params"]',
        b'{"a": "kv_transfer_params"}',
        b'{"kv_transfer_params": {"a": "\\ud800"}}',
        b'{"kv_transfer_params": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'\xff"kv_transfer_params"',
    ],
    ids=range(7),
)
def test_bodies_that_are_no_requests_are_left_to_vllm(body):
    bare = FrontEnd()
    bare.client.app.user_middleware.clear()
    replies = []
    for front in (FrontEnd(), bare):
        try:
            reply = front.client.post("/v1/completions", content=body)
            replies.append((reply.status_code, reply.content))
        except Exception as error:
            replies.append(repr(error))
    assert replies[0] == replies[1]


def test_a_prefill_leg_with_a_bad_transfer_id_is_refused():
    leg = {"do_remote_decode": True, "transfer_id": 5}
    reply = FrontEnd(role="kv_producer", bootstrap_port=9000).post(leg)
    assert reply.status_code == 400 and "transfer_id 5 is not a string" in reply.text
    assert FrontEnd(role="kv_producer").post(leg, "answer").status_code == 200


def test_before_the_engine_is_known_requests_pass():
    front = FrontEnd()
    del front.client.app.state.vllm_config
    assert front.post(handoff() | {"remote_host": None}, "answer").status_code == 200


# ---- prefills that may not be connected to -------------------------------------------------------


@pytest.mark.parametrize("policy", ["fail", "recompute"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "named",
    [
        {"remote_host": "10.1.0.1"},
        {"remote_host": "evil.example"},
        {"remote_bootstrap_addr": "http://10.1.0.1:8998", "transfer_id": "t", "lynx": None},
    ],
)
def test_a_prefill_that_is_not_allowed_is_400(heard, policy, stream, named):
    front = FrontEnd(policy, allowed_prefills=["10.0.0.0/16"])
    reply = front.post(handoff() | named, stream=stream)
    assert reply.status_code == 400
    assert "not among allowed_prefills" in reply.text
    assert front.seen == [], "the engine has not seen it"
    assert heard.counted == [("consumer", "not_allowed")]


def test_an_allowed_prefill_passes(heard):
    front = FrontEnd(allowed_prefills=["10.0.0.0/16", "prefill-0"])
    for host in ("10.0.0.1", "prefill-0"):
        assert front.post(handoff() | {"remote_host": host}, "answer").status_code == 200
    assert len(front.seen) == 2
