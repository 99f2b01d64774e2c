# SPDX-License-Identifier: Apache-2.0
"""How the tests talk to a running pair, and how they see that nothing was left behind."""

import itertools
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil

from lynx_connector.testbed.cluster import Cluster
from lynx_connector.testbed.launch import Role

TIMEOUT = 120.0
PREFILL_LEG = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


def transfer_flag(kv_role: str, policy: str, lynx: dict[str, Any]) -> list[str]:
    """`--kv-transfer-config` with a failure policy."""
    config = {
        "kv_connector": "LynxConnector",
        "kv_role": kv_role,
        "kv_load_failure_policy": policy,
        "kv_connector_extra_config": lynx,
    }
    return ["--kv-transfer-config", json.dumps(config)]


def prompt(seed: int, items: int = 25) -> str:
    """A prompt of about 10 tokens an item; different seeds share no block."""
    words = ("costs", "weighs", "measures", "is worth", "needs", "returns")
    unit = ("dollars", "grams", "metres", "points", "hours", "coins")
    text = " ".join(
        f"Item {i + seed} {words[(i * 7 + seed) % 6]} {(i * 7 + seed * 13) % 93} "
        f"{unit[(i + seed) % 6]}."
        for i in range(items)
    )
    return f"List {seed}. {text} In short, this list says that"


def post(url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """POST and return the JSON answer; HTTP errors raise with the server's text."""
    reply = httpx.post(url + path, json=body, timeout=TIMEOUT, trust_env=False)
    if reply.status_code != 200:
        raise httpx.HTTPStatusError(reply.text, request=reply.request, response=reply)
    return reply.json()


def tokens(answer: dict[str, Any]) -> list[int]:
    """Token ids of a completion's only choice."""
    return answer["choices"][0]["token_ids"]


class DecodeServer:
    """One decode server and its events."""

    url: str
    events_path: Path

    def completion(self, text: str | list[int], **body: Any) -> dict[str, Any]:
        """An ordinary completion, greedy unless said otherwise."""
        body = {"temperature": 0, "max_tokens": 32, "return_token_ids": True} | body
        return post(self.url, "/v1/completions", {"model": "m", "prompt": text} | body)

    def mark(self) -> int:
        """A position in the events file."""
        return self.events_path.stat().st_size

    def events(self, since: int, name: str | None = None) -> list[dict[str, Any]]:
        """Events after a mark, of one name if given."""
        with self.events_path.open() as file:
            file.seek(since)
            found = [json.loads(line) for line in file if line.endswith("\n")]
        return [event for event in found if name is None or event["event"] == name]

    def wait_for(self, since: int, name: str, seconds: float = 30.0) -> dict[str, Any]:
        """The first event of a name after a mark."""
        deadline = time.monotonic() + seconds
        while not (found := self.events(since, name)):
            assert time.monotonic() < deadline, f"no {name} event"
            time.sleep(0.02)
        return found[0]


class Pair(DecodeServer):
    """The session's servers."""

    def __init__(self, cluster: Cluster, bootstrap_port: int | None = None):
        self.cluster = cluster
        self.bootstrap_port = bootstrap_port
        self.url = cluster.decode.url
        self.prefill_url = cluster.prefill.url
        self.events_path = cluster.events_file(Role.DECODE)
        self.prefill_events = cluster.events_file(Role.PREFILL)
        self._abandoned: set[str] = set()

    def prefill(self, text: str | list[int], **body: Any) -> dict[str, Any]:
        """The prefill leg as routers send it; returns kv_transfer_params."""
        body = {"temperature": 0} | body | {"max_tokens": 1, "min_tokens": 1}
        body |= {"model": "m", "prompt": text, "kv_transfer_params": PREFILL_LEG}
        for key in ("logprobs", "stop", "stop_token_ids", "n"):
            body.pop(key, None)
        return post(self.prefill_url, "/v1/completions", body)["kv_transfer_params"]

    def learn(self) -> None:
        """Prefill prompts until the prefill server has learned all it wants to.

        By the clock: on a fresh checkout a codec's kernels are compiled before it is used, and
        nothing is learned meanwhile.
        """
        deadline = time.monotonic() + 300
        for seed in itertools.count(2000):
            if "learning is done" in self.cluster.prefill.log.read_text():
                break
            assert time.monotonic() < deadline, "nothing was learned"
            self.lynx(prompt(seed, items=60), max_tokens=1)
        for seed in range(1040, 1044):  # its scheduler half hears of it with the next steps
            codec = self.prefill_and_drop(prompt(seed))["lynx"]["codec"]
            if codec == "klt":
                self.forget()
                return
        raise AssertionError("no tables were learned")

    def prefill_and_drop(self, text: str) -> dict[str, Any]:
        """kv_transfer_params of a prefill that is fetched at once and not looked at."""
        params = self.prefill(text)
        self.completion(text, kv_transfer_params=params, max_tokens=1)
        return params

    def lynx(self, text: str | list[int], **body: Any) -> dict[str, Any]:
        """Prefill there, decode here, starting on the anchor."""
        params = self.prefill(text, **{k: v for k, v in body.items() if k != "max_tokens"})
        return self.completion(text, kv_transfer_params=params, **body)

    def blocking(self, text: str | list[int], **body: Any) -> dict[str, Any]:
        """The same with the final cache: an ordinary decode of what the transfer leaves."""
        self.forget()
        answer = self.lynx(text, vllm_xargs={"lynx_start": "blocking"}, **body)
        self.forget()
        return answer

    def blocking_keep(self, ids: list[int]) -> dict[str, Any]:
        """As `blocking`, leaving the refined blocks in the prefix cache."""
        return self.lynx(ids, vllm_xargs={"lynx_start": "blocking"}, max_tokens=2)

    def prompt_ids(self, text: str) -> list[int]:
        """The prompt's token ids."""
        return post(self.url, "/tokenize", {"model": "m", "prompt": text})["tokens"]

    def bytes_of(self, num_tokens: int) -> float:
        """About what a whole prompt of SmolLM2 takes on the wire (30 layers, 3 heads of 64)."""
        return num_tokens * 30 * 2 * 3 * 64 * 8.125 / 8 + 17 * 30 * 2 * 3 * 64 * 4

    def forget(self) -> None:
        """Empty the decode side's prefix cache; fails if a block is still held."""
        _empty_prefix_cache(self.url)

    def forget_prefill(self) -> None:
        """The same for the prefill side."""
        _empty_prefix_cache(self.prefill_url)

    def preempt_everything(self) -> None:
        """Preempt all running requests of the decode side."""
        httpx.post(
            self.url + "/reset_prefix_cache",
            params={"reset_running_requests": "true"},
            timeout=30,
            trust_env=False,
        )

    def assert_same(
        self, text: str, since_at_least: int = 0, must_draft: bool = True, **body: Any
    ) -> dict[str, Any]:
        """Speculative and blocking answers are equal token for token; returns the `verified`
        event, if there is one."""
        reference = self.blocking(text, **body)
        since = self.mark()
        answer = self.lynx(text, **body)
        verified = self.events(since, "verified")
        self.forget()
        assert tokens(answer) == tokens(reference)
        ours, theirs = answer["choices"][0], reference["choices"][0]
        assert ours["text"] == theirs["text"]
        assert ours["finish_reason"] == theirs["finish_reason"]
        assert answer["usage"]["completion_tokens"] == reference["usage"]["completion_tokens"]
        assert verified or not must_draft, "the request was never verified, so it never drafted"
        event = verified[0] if verified else {"drafted": 0}
        assert event["drafted"] >= since_at_least
        return event | {"answer": answer, "reference": reference}

    def many(self, calls: list, at_once: int = 0) -> list:
        """Run calls at the same time, all or some of them; results in order."""
        with ThreadPoolExecutor(at_once or len(calls)) as pool:
            return [future.result() for future in [pool.submit(call) for call in calls]]

    def prefill_events_of(self, transfer: str) -> list[dict[str, Any]]:
        """The producer's events of one transfer."""
        events = [json.loads(line) for line in self.prefill_events.read_text().splitlines()]
        return [event for event in events if event["transfer"] == transfer]

    def tables_sent(self) -> list[dict[str, Any]]:
        """The producer's `tables_sent` events."""
        return self._prefill("tables_sent")

    def restart_prefill(self) -> None:
        """Start the killed prefill server again; what it had staged died with it."""
        self._abandoned |= {event["transfer"] for event in self._prefill("chunk_encoded")}
        self.cluster.prefill.start()
        self.cluster.prefill.wait_ready(300)

    # ---- nothing left -------------------------------------------------------------------

    def assert_idle(self, seconds: float = 20.0) -> None:
        """Both sides are back at their idle counts."""
        deadline = time.monotonic() + seconds
        while left := self._left():
            assert time.monotonic() < deadline, f"left behind: {left}"
            time.sleep(0.1)

    def _left(self) -> list[str]:
        left = []
        for name, url in (("prefill", self.prefill_url), ("decode", self.url)):
            metrics = httpx.get(url + "/metrics", timeout=30, trust_env=False).text
            for metric in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
                for line in metrics.splitlines():
                    if line.startswith(f"vllm:{metric}{{") and float(line.rsplit(" ", 1)[1]):
                        left.append(f"{name}: {line}")
        for path, name in ((self.prefill_events, "released"), (self.events_path, "transfer_ended")):
            ended = [json.loads(x) for x in path.read_text().splitlines() if f'"{name}"' in x]
            if ended and ended[-1]["staging_bytes"]:
                left.append(f"{path.name}: {ended[-1]}")
        handed = {e["transfer"] for e in self._prefill("chunk_encoded")}
        released = {e["transfer"] for e in self._prefill("released")}
        if open_transfers := handed - released - self._abandoned:
            left.append(f"staged transfers: {open_transfers}")
        return left

    def _prefill(self, name: str) -> list[dict[str, Any]]:
        lines = self.prefill_events.read_text().splitlines()
        return [json.loads(line) for line in lines if f'"{name}"' in line]


def connections(pid: int) -> int:
    """Established TCP connections of a process tree."""
    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return sum(
        connection.status == psutil.CONN_ESTABLISHED
        for process in processes
        for connection in process.net_connections("tcp")
    )


def _empty_prefix_cache(url):
    deadline = time.monotonic() + 20
    while True:
        reply = httpx.post(url + "/reset_prefix_cache", timeout=30, trust_env=False)
        if reply.json().get("success", reply.status_code == 200):
            return
        assert time.monotonic() < deadline, "blocks are still held"
        time.sleep(0.1)
