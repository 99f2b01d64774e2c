# SPDX-License-Identifier: Apache-2.0
"""The streaming client against a server that says what the test wants."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lynx_connector.testbed.client import RequestError, stream_chat, stream_completion


class Scripted(ThreadingHTTPServer):
    """Answers every POST with `status` and `body`; keeps what it was sent."""

    status = 200
    body = b""
    seen: dict


class Handler(BaseHTTPRequestHandler):
    server: Scripted

    def do_POST(self):
        self.server.seen = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(self.server.status)
        self.send_header("content-length", str(len(self.server.body)))
        self.end_headers()
        self.wfile.write(self.server.body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server() -> Iterator[Scripted]:
    with Scripted(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def url(server: Scripted) -> str:
    return f"http://127.0.0.1:{server.server_port}"


def chunk(text: str, ids: list[int], finish: str | None = None) -> bytes:
    choice = {"delta": {"content": text}, "token_ids": ids, "finish_reason": finish}
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


def test_text_and_tokens_of_all_chunks(server: Scripted):
    server.body = chunk("", []) + chunk("Hel", [1, 2]) + chunk("lo", [3], "length")
    server.body += b"data: [DONE]\n\n"
    answer = stream_chat(url(server), {"model": "m"})
    assert (answer.text, answer.token_ids, answer.finish_reason) == ("Hello", [1, 2, 3], "length")
    assert len(answer.token_times) == 3
    assert answer.token_times == sorted(answer.token_times)
    assert server.seen == {"model": "m", "stream": True, "return_token_ids": True}


def test_an_http_error_carries_the_servers_words(server: Scripted):
    server.status, server.body = 400, b"no such model"
    with pytest.raises(RequestError, match="400: no such model"):
        stream_chat(url(server), {})


def test_an_error_inside_the_stream_is_raised(server: Scripted):
    server.body = chunk("a", [1]) + b'data: {"error": {"message": "KV load failed"}}\n\n'
    with pytest.raises(RequestError, match="KV load failed"):
        stream_chat(url(server), {})


def test_a_stream_that_breaks_off_is_an_error(server: Scripted):
    server.body = chunk("a", [1])
    with pytest.raises(RequestError, match="ended after 1 tokens"):
        stream_chat(url(server), {})


def test_a_server_that_is_not_there_is_named():
    with pytest.raises(RequestError, match=r"127\.0\.0\.1:9"):
        stream_chat("http://127.0.0.1:9", {}, timeout=5)


def test_completions_stream_like_chats(server):
    chunk = {"choices": [{"text": "a lynx", "token_ids": [5, 6], "finish_reason": "length"}]}
    server.body = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n".encode()
    answer = stream_completion(f"http://127.0.0.1:{server.server_port}", {"prompt": [1]})
    assert (answer.text, answer.token_ids, answer.finish_reason) == ("a lynx", [5, 6], "length")
    assert server.seen == {"prompt": [1], "stream": True, "return_token_ids": True}
