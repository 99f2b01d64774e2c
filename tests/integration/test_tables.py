# SPDX-License-Identifier: Apache-2.0
"""A running pair begins without tables, learns them from the prompts, and never shows it.

Each test has a prefill server of its own, with an empty folder of tables, before the decode
instance that fails what it cannot load. That a restarted one has what it learned: test_faults.py.
"""

import json

import pytest

from .lone_servers import PrefillOnly
from .pair import prompt, tokens

LEARN_TOKENS = 4096
BODY = {"max_tokens": 32, "ignore_eos": True}


@pytest.fixture(scope="module")
def cold(model, tmp_path_factory):
    """Two prefill servers without tables: one that refines to 8 bits, one to every bit.

    Staging of the second has room for two or three transfers.
    """

    def make(name, **lynx):
        folder = tmp_path_factory.mktemp(name)
        learning = {
            "codec": "klt",
            "plan": "fixed",
            "early_reply": False,  # a streamed transfer leaves no time to draft
            "tables_dir": str(folder / "tables"),
            "learn_tokens": LEARN_TOKENS,
        }
        return PrefillOnly(model, folder, link_mbit=80, **learning, **lynx)

    refined = make("refined")
    exact = make("exact", final_tier="exact", staging_bytes=48 << 20)
    try:
        refined.server.start()
        exact.server.start()
        refined.server.wait_ready(300)
        exact.server.wait_ready(300)
        yield refined, exact
    finally:
        refined.server.stop()
        exact.server.stop()


def answer(decode, text, params, start):
    reply = decode.completion(
        text, kv_transfer_params=params, vllm_xargs={"lynx_start": start}, **BODY
    )
    return tokens(reply)


def events(pair, name):
    lines = pair.prefill_events.read_text().splitlines()
    return [json.loads(line) for line in lines if f'"event":"{name}"' in line]


def test_switch_and_second_consumer(cold, pair, strict_decode):
    """Refined to 8 bits: with either codec drafting changes no token."""
    prefill = cold[0]
    first = prefill.before(pair, strict_decode)
    since = first.mark()
    seen = []
    for seed in range(200, 300):
        text = prompt(seed, items=60)
        params, answers = [], []
        for start in ("blocking", "speculative"):
            params.append(first.prefill(text))
            answers.append(answer(first, text, params[-1], start))
            first.forget()
        if params[0]["lynx"]["tables"] == params[1]["lynx"]["tables"]:
            assert answers[0] == answers[1], (seed, params[0]["lynx"]["codec"])
        seen.append((params[1]["lynx"]["codec"], *params[1]["lynx"]["tables"]))
        if len(set(seen)) == 3 and seen.count(seen[-1]) == 3:
            break
    assert seen[0] == ("hadamard",)
    versions = list(dict.fromkeys(seen))
    assert [codec for codec, *_ in versions] == ["hadamard", "klt", "klt"]
    assert first.events(since, "verified")
    assert "learning is done" in prefill.server.log.read_text()
    # vLLM's attention has shown its queries: a quarter of the tokens, in every step.
    for event in events(first, "tables_learned"):
        assert event["queries"] >= event["tokens"] // 5

    sent = events(first, "tables_sent")
    assert {event["digest"] for event in sent} == {digest for _, digest in versions[1:]}
    assert len(sent) == 2  # each once

    # Another consumer fetches them, too, and says the same.
    text = prompt(300, items=40)
    params = first.prefill(text)
    expected = answer(first, text, params, "blocking")
    first.forget()
    assert len(events(first, "tables_sent")) == 2
    second = prefill.before(pair)
    since = second.mark()
    assert answer(second, text, second.prefill(text), "speculative") == expected
    assert len(events(second, "tables_sent")) == 3
    assert not second.events(since, "failed")
    for each in (first, second):
        each.forget()
        each.assert_idle()


def test_exact_tier_gives_the_tokens_of_a_single_server(cold, pair, strict_decode):
    """Bit for bit the prefill's cache, so that no codec and no switch can be seen at all.

    Staging has room for two or three of the transfers: of many at once most wait, and none fails.
    """
    first = cold[1].before(pair, strict_decode)
    since = first.mark()
    codecs = []
    for batch in range(25):
        texts = [prompt(400 + 4 * batch + i, items=35 + 5 * i) for i in range(4)]
        expected = [tokens(first.completion(text, **BODY)) for text in texts]
        first.forget()

        def ask(text):
            params = first.prefill(text)
            codecs.append(params["lynx"]["codec"])
            return answer(first, text, params, "speculative")

        answers = first.many([lambda text=text: ask(text) for text in texts])
        first.forget()
        assert answers == expected
        if codecs.count("klt") >= 6:
            break
    assert codecs[0] == "hadamard"
    assert codecs[-1] == "klt"
    refined = first.events(since, "refined")
    assert all(event["wire_bytes"]["exact"] for event in refined)
    assert first.events(since, "verified")

    texts = [prompt(600 + i, items=40) for i in range(16)]
    short = {"max_tokens": 4}
    answers = first.many([lambda text=text: first.lynx(text, **short) for text in texts])
    first.forget()
    assert [tokens(one) for one in answers] == [
        tokens(first.completion(text, **short)) for text in texts
    ]
    waited = [event["waited_seconds"] for event in events(first, "started")]
    assert sum(seconds > 0.1 for seconds in waited) > 8
    first.assert_idle()
