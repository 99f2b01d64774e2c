# SPDX-License-Identifier: Apache-2.0
"""A running pair begins without tables, learns them from the prompts, and never shows it.

Each test has servers of its own, with empty folders of tables.
"""

import contextlib
import json

from lynx_connector.testbed.cluster import Cluster, Side
from lynx_connector.testbed.link import loopback

from .pair import DecodeOnly, Pair, prompt, tokens, transfer_flag

LEARN_TOKENS = 4096
BODY = {"max_tokens": 32, "ignore_eos": True}


@contextlib.contextmanager
def cold_pair(model, folder, **lynx):
    """Servers without tables; `lynx`: settings of the prefill side."""
    decode = {
        "events_file": str(folder / "events-decode.jsonl"),
        "transfer_timeout_seconds": 20,
        "tables_dir": str(folder / "tables-decode"),
    }
    learning = {
        "codec": "klt",
        "plan": "fixed",
        "early_reply": False,  # a streamed transfer leaves no time to draft
        "tables_dir": str(folder / "tables-prefill"),
        "learn_tokens": LEARN_TOKENS,
    }
    cluster = Cluster(
        model,
        folder,
        link=loopback(80),
        dtype="float32",
        router=False,
        prefill=Side(
            lynx=learning | lynx,
            vllm_args=["--max-num-batched-tokens", "512", "--served-model-name", "m"],
        ),
        decode=Side(
            vllm_args=[
                *transfer_flag("kv_consumer", "fail", decode),
                "--max-num-seqs",
                "12",
                "--served-model-name",
                "m",
            ]
        ),
    )
    with cluster:
        cluster.start()
        yield Pair(cluster)


def answer(decode, text, params, start):
    reply = decode.completion(
        text, kv_transfer_params=params, vllm_xargs={"lynx_start": start}, **BODY
    )
    return tokens(reply)


def events(pair, name):
    lines = pair.prefill_events.read_text().splitlines()
    return [json.loads(line) for line in lines if f'"event":"{name}"' in line]


def test_switch_restart_and_second_consumer(model, tmp_path):
    """Refined to 8 bits: with either codec drafting changes no token."""
    with cold_pair(model, tmp_path) as pair:
        seen = []
        for seed in range(200, 300):
            text = prompt(seed, items=60)
            params, answers = [], []
            for start in ("blocking", "speculative"):
                params.append(pair.prefill(text))
                answers.append(answer(pair, text, params[-1], start))
                pair.forget()
            if params[0]["lynx"]["tables"] == params[1]["lynx"]["tables"]:
                assert answers[0] == answers[1], (seed, params[0]["lynx"]["codec"])
            seen.append((params[1]["lynx"]["codec"], *params[1]["lynx"]["tables"]))
            if len(set(seen)) == 3 and seen.count(seen[-1]) == 3:
                break
        assert seen[0] == ("hadamard",)
        versions = list(dict.fromkeys(seen))
        assert [codec for codec, *_ in versions] == ["hadamard", "klt", "klt"]
        assert pair.events(0, "verified")
        assert "learning is done" in pair.cluster.prefill.log.read_text()
        # vLLM's attention has shown its queries: a quarter of the tokens, in every step.
        for event in events(pair, "tables_learned"):
            assert event["queries"] >= event["tokens"] // 5

        newest = versions[-1][1]
        sent = events(pair, "tables_sent")
        assert {event["digest"] for event in sent} == {digest for _, digest in versions[1:]}
        assert len(sent) == 2  # each once

        # A restarted prefill begins with what it has learned, and its consumer has it already.
        pair.cluster.prefill.stop()
        pair.restart_prefill()
        text = prompt(300, items=40)
        params = pair.prefill(text)
        assert params["lynx"]["tables"] == [newest]
        expected = answer(pair, text, params, "blocking")
        pair.forget()
        assert len(events(pair, "tables_sent")) == 2

        folder = tmp_path / "second"
        folder.mkdir()
        with DecodeOnly(model, folder) as second:
            assert answer(second, text, pair.prefill(text), "speculative") == expected
            assert len(events(pair, "tables_sent")) == 3
        pair.assert_idle()


def test_exact_tier_gives_the_tokens_of_a_single_server(model, tmp_path):
    """Bit for bit the prefill's cache, so that no codec and no switch can be seen at all.

    Staging has room for two or three of the transfers: of many at once most wait, and none fails.
    """
    with cold_pair(model, tmp_path, final_tier="exact", staging_bytes=48 << 20) as pair:
        codecs = []
        for batch in range(25):
            texts = [prompt(400 + 4 * batch + i, items=35 + 5 * i) for i in range(4)]
            expected = [tokens(pair.completion(text, **BODY)) for text in texts]
            pair.forget()

            def ask(text):
                params = pair.prefill(text)
                codecs.append(params["lynx"]["codec"])
                return answer(pair, text, params, "speculative")

            answers = pair.many([lambda text=text: ask(text) for text in texts])
            pair.forget()
            assert answers == expected
            if codecs.count("klt") >= 6:
                break
        assert codecs[0] == "hadamard"
        assert codecs[-1] == "klt"
        refined = pair.events(0, "refined")
        assert all(event["wire_bytes"]["exact"] for event in refined)
        assert pair.events(0, "verified")

        texts = [prompt(600 + i, items=40) for i in range(16)]
        short = {"max_tokens": 4}
        answers = pair.many([lambda text=text: pair.lynx(text, **short) for text in texts])
        pair.forget()
        assert [tokens(one) for one in answers] == [
            tokens(pair.completion(text, **short)) for text in texts
        ]
        waited = [event["waited_seconds"] for event in events(pair, "started")]
        assert sum(seconds > 0.1 for seconds in waited) > 8
        pair.assert_idle()
