# SPDX-License-Identifier: Apache-2.0
"""Tiers beside vLLM's own speculative decoding, and beside a second KV connector.

A prefill instance with two connectors serves two decode instances: one with two connectors in the
other order, one that drafts from the prompt's n-grams. Both have a Lynx scheduler, and start each
request when its KV is complete. The exact tier restores every bit, so that both have to say what an
ordinary request says.
"""

import json

import httpx
import pytest

from lynx_connector.testbed.cluster import Cluster, Side
from lynx_connector.testbed.launch import Role
from tests.conftest import is_wanted

from .pair import DecodeServer, Pair, prompt, tokens

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}


def _several(*connectors):
    config = {"kv_connector": "MultiConnector", "kv_role": "kv_both"}
    config["kv_connector_extra_config"] = {"connectors": list(connectors)}
    return ["--kv-transfer-config", json.dumps(config), "--served-model-name", "m"]


def _lynx(role, folder, **extra):
    extra |= {"events_file": str(folder / f"events-{role}.jsonl")}
    extra |= {"tables_dir": str(folder / f"tables-{role}")}
    return {
        "kv_connector": "LynxConnector",
        "kv_role": role.kv_role,
        "kv_connector_extra_config": extra,
    }


def _store(folder):
    extra = {"shared_storage_path": str(folder)}
    return {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": extra,
    }


@pytest.fixture(scope="module")
def ngram_begun(model, tmp_path_factory):
    """The server that drafts from n-grams: started, and not waited for."""
    folder = tmp_path_factory.mktemp("ngram")
    args = ["--speculative-config", json.dumps(NGRAM), "--served-model-name", "m"]
    cluster = Cluster(
        model,
        folder,
        dtype="float32",
        max_model_len=2048,
        router=False,
        decode=Side(lynx={"tables_dir": str(folder / "tables")}, vllm_args=args),
    )
    try:
        cluster.decode.start()
        yield cluster
    finally:
        cluster.decode.stop()


@pytest.fixture(scope="module")
def several(request, model, ngram_begun, tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    sent = {"codec": "hadamard", "final_tier": "exact", "advertise_host": "127.0.0.1"}
    prefill = _several(
        _lynx(Role.PREFILL, folder, **sent), _store(tmp_path_factory.mktemp("store-prefill"))
    )
    decode = _several(_store(tmp_path_factory.mktemp("store-decode")), _lynx(Role.DECODE, folder))
    cluster = Cluster(
        model,
        folder,
        dtype="float32",
        max_model_len=2048,
        router=False,
        prefill=Side(vllm_args=prefill),
        decode=Side(vllm_args=decode),
    )
    with cluster:
        cluster.start()
        if is_wanted(request, "pair"):
            request.getfixturevalue("begun")  # starts beside the tests of this file
        yield Pair(cluster)


class _Server(DecodeServer):
    def __init__(self, url, events_path):
        self.url = url
        self.events_path = events_path


@pytest.fixture(scope="module")
def ngram(ngram_begun):
    server = ngram_begun.decode
    server.wait_ready(300)
    assert "waits for the final tier" in server.log.read_text()
    return _Server(server.url, ngram_begun.events_file(Role.DECODE))


def _metric(url, name):
    text = httpx.get(url + "/metrics", timeout=30, trust_env=False).text
    lines = [line for line in text.splitlines() if line.startswith(name)]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def _check(several, server, text, **body):
    """Over the transfer, and on the same server without one."""
    reference = server.completion(text, **body)
    httpx.post(server.url + "/reset_prefix_cache", timeout=30, trust_env=False)
    params = several.prefill(text)
    since = server.mark()
    answer = server.completion(text, kv_transfer_params=params, **body)
    assert tokens(answer) == tokens(reference)
    (admitted,) = server.events(since, "admitted")
    assert admitted["start"] == "blocking"
    assert not server.events(since, "drafting")
    httpx.post(server.url + "/reset_prefix_cache", timeout=30, trust_env=False)


def test_beside_a_second_connector(several):
    """Prompts that the second connector of the decode instance has not seen."""
    for seed in (1, 2):
        text = prompt(3000 + seed)
        params = several.prefill(text)
        since = several.mark()
        answer = several.completion(text, kv_transfer_params=params)
        (admitted,) = several.events(since, "admitted")
        assert admitted["start"] == "blocking"
        assert several.events(since, "refined")
        several.forget()
        # From what the second connector has kept: it must be the complete KV.
        assert tokens(several.completion(text)) == tokens(answer)
        several.forget()
        again = several.prefill(text)  # the prefill's second connector has the prompt
        assert tokens(several.completion(text, kv_transfer_params=again)) == tokens(answer)
        several.forget()
    several.assert_idle()


def test_metrics_beside_a_second_connector(several):
    several.completion(prompt(3010), kv_transfer_params=several.prefill(prompt(3010)))
    several.forget()
    assert _metric(several.prefill_url, "vllm:lynx_sent_bytes_total") > 0
    assert _metric(several.url, "vllm:lynx_received_bytes_total") > 0


@pytest.mark.parametrize("length", [127, 128, 129, 511])
def test_speculative_decoding_of_whole_blocks_and_neighbours(several, ngram, length):
    """vLLM reserves slots for its drafts behind the loaded prompt."""
    ids = [(i * 7919) % 20000 + 1000 + length for i in range(length // 4 + 1)]
    ids = (ids * 4)[:length]  # for n-grams to be found
    _check(several, ngram, ids, max_tokens=24, ignore_eos=True)


def test_speculative_decoding_at_once(several, ngram):
    texts = [prompt(3100 + i, items=12 + i) for i in range(5)]
    references = [tokens(ngram.completion(text)) for text in texts]
    httpx.post(ngram.url + "/reset_prefix_cache", timeout=30, trust_env=False)
    handoffs = [several.prefill(text) for text in texts]
    calls = [
        lambda t=t, p=p: ngram.completion(t, kv_transfer_params=p)
        for t, p in zip(texts, handoffs, strict=True)
    ]
    assert [tokens(answer) for answer in several.many(calls)] == references
    assert _metric(ngram.url, "vllm:spec_decode_num_draft_tokens_total") > 0
