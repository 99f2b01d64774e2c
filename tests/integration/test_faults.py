# SPDX-License-Identifier: Apache-2.0
"""A failed, late, corrupt or forged transfer never becomes a wrong token.

Each fault meets a decode instance that recomputes and one that fails the request; both log one line
with request, peer and cause, and go on serving.
"""

import time

import httpx
import pytest

from lynx_connector.transport import sources
from lynx_connector.wire.messages import PROTOCOL_VERSION

from .pair import prompt, tokens
from .rogue import RogueProducer, compatibility_of, handoff

TEXT = prompt(150)


@pytest.fixture(scope="module")
def compat(pair):
    return compatibility_of(pair.cluster.prefill.log)


@pytest.fixture
def rogue(ucx_loop, compat):
    producer = RogueProducer(ucx_loop, compat, link_mbit=40)
    yield producer
    producer.close()


@pytest.fixture(scope="module")
def other_model(ucx_loop):
    producer = RogueProducer(ucx_loop, "0" * 32)
    yield producer
    producer.close()


@pytest.fixture(scope="module")
def reference(pair):
    """The text's tokens ids, and what an ordinary request answers."""
    expected = tokens(pair.completion(TEXT, ignore_eos=True))
    pair.forget()
    return len(pair.prompt_ids(TEXT)), expected


def check_both(pair, strict, reference, make_params, cause):
    """Recomputed on one instance, refused on the other at the same time; the cause is in both
    logs."""
    expected = reference[1]
    since = pair.mark()
    params, strict_params = make_params(), make_params()

    def refuse():
        with pytest.raises(httpx.HTTPStatusError):
            strict.completion(TEXT, ignore_eos=True, kv_transfer_params=strict_params)
        assert cause in strict.server.log.read_text()
        # The server goes on.
        assert tokens(strict.completion(TEXT, ignore_eos=True)) == expected
        httpx.post(strict.url + "/reset_prefix_cache", timeout=30, trust_env=False)

    def recompute():
        return pair.completion(TEXT, ignore_eos=True, kv_transfer_params=params)

    answer, _ = pair.many([recompute, refuse])
    assert tokens(answer) == expected
    failed = pair.events(since, "failed")
    assert cause in failed[0]["cause"]
    log = pair.cluster.decode.log.read_text()
    assert failed[0]["request"] in [
        word.rstrip(":") for line in log.splitlines() if cause in line for word in line.split()
    ]
    pair.forget()


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"remote_host": None}, "remote_host"),
        ({"lynx": {"version": PROTOCOL_VERSION}}, "num_tokens"),
        ({"lynx": None}, "lynx"),
    ],
)
def test_malformed_parameters(pair, strict_decode, reference, change, cause):
    params = handoff("t", reference[0], 9) | change
    check_both(pair, strict_decode, reference, lambda: dict(params), cause)


def test_parameters_of_another_connector(pair, strict_decode, reference):
    params = handoff("t", reference[0], 9)
    del params["lynx"]
    check_both(pair, strict_decode, reference, lambda: dict(params), "no key 'lynx'")


def test_other_protocol_version(pair, strict_decode, reference):
    params = handoff("t", reference[0], 9, version=99)
    check_both(pair, strict_decode, reference, lambda: dict(params), "protocol 99")


def test_other_prompt_length(pair, strict_decode, reference):
    """Nothing is lost by computing it here, whatever the policy says."""
    params = handoff("t", reference[0] + 1, 9)
    for decode in (pair, strict_decode):
        since = decode.mark()
        answer = decode.completion(TEXT, ignore_eos=True, kv_transfer_params=dict(params))
        assert tokens(answer) == reference[1]
        assert "same tokenizer" in decode.events(since, "failed")[0]["cause"]
        httpx.post(decode.url + "/reset_prefix_cache", timeout=30, trust_env=False)


def test_unknown_transfer_on_the_real_prefill(pair, strict_decode, reference):
    real = pair.prefill(TEXT)
    pair.completion(TEXT, kv_transfer_params=real)
    pair.forget()
    port = real["remote_port"]
    params = handoff("no-such-transfer", reference[0], port)
    check_both(pair, strict_decode, reference, lambda: dict(params), "unknown transfer")


def test_unknown_codec(pair, strict_decode, reference):
    params = handoff("t", reference[0], 9, codec="zip")
    check_both(pair, strict_decode, reference, lambda: dict(params), "unknown codec 'zip'")


def test_one_handoff_used_twice_at_once(pair, reference):
    """The first request gets the transfer, the second recomputes; both answer."""
    text = prompt(152, items=80)
    plain = tokens(pair.completion(text, ignore_eos=True))
    pair.forget()
    remote = tokens(pair.blocking(text, ignore_eos=True))
    params = pair.prefill(text)
    since = pair.mark()
    ask = lambda: pair.completion(text, ignore_eos=True, kv_transfer_params=params)  # noqa: E731
    answers = [tokens(answer) for answer in pair.many([ask, ask])]
    assert remote in answers
    assert all(answer in (plain, remote) for answer in answers)
    assert "already used" in pair.events(since, "failed")[0]["cause"]
    pair.forget()


def test_nobody_listens(pair, strict_decode, reference):
    params = handoff("t", reference[0], 9)
    check_both(pair, strict_decode, reference, lambda: dict(params), "127.0.0.1:9")


def test_other_model(pair, strict_decode, reference, other_model):
    check_both(
        pair,
        strict_decode,
        reference,
        lambda: other_model.handoff(reference[0]),
        "another model",
    )


def test_corrupt_anchor(pair, strict_decode, reference, rogue, monkeypatch):
    monkeypatch.setattr(sources, "checksum", lambda payload: 1)
    check_both(
        pair, strict_decode, reference, lambda: rogue.handoff(reference[0]), "corrupt anchor frame"
    )
    assert rogue.store.used_bytes == 0


def test_corrupt_residual_while_drafting(pair, strict_decode, reference, rogue, monkeypatch):
    """Drafts from noise were made, none of them may come out."""
    whole = sources.checksum
    anchor = [rogue._exact.bytes_per_token(0), rogue._codec.bytes_per_token(0)]

    def checksum(payload):
        return whole(payload) if any(payload.nbytes % width == 0 for width in anchor) else 1

    monkeypatch.setattr(sources, "checksum", checksum)
    since = pair.mark()
    check_both(
        pair,
        strict_decode,
        reference,
        lambda: rogue.handoff(reference[0]),
        "corrupt residual frame",
    )
    assert pair.events(since, "drafting")
    assert pair.events(since, "fallback")
    assert rogue.store.used_bytes == 0


def test_expired_lease(pair, strict_decode, reference, ucx_loop, compat):
    producer = RogueProducer(ucx_loop, compat, lease=0.1)
    try:

        def expired():
            params = producer.handoff(reference[0])
            deadline = time.monotonic() + 10
            while len(producer.store) and time.monotonic() < deadline:
                time.sleep(0.1)
            return params

        check_both(pair, strict_decode, reference, expired, "lease_seconds")
    finally:
        producer.close()


def test_full_staging(pair, strict_decode, reference, rogue):
    def refused():
        rogue.store._limit = 1000
        return rogue.handoff(reference[0])

    check_both(pair, strict_decode, reference, refused, "staging is full")


def test_prefill_killed_between_tiers_and_before_the_fetch(pair, reference):
    """The real prefill server dies while a request drafts; later handoffs of it reach nobody."""
    cluster = pair.cluster
    long_text = prompt(151, items=120)
    expected = tokens(pair.completion(long_text, ignore_eos=True))
    pair.forget()
    orphan = pair.prefill(TEXT)
    since = pair.mark()

    def kill():
        pair.wait_for(since, "drafting")
        cluster.prefill.kill()

    answer, _ = pair.many([lambda: pair.lynx(long_text, ignore_eos=True), kill])
    assert tokens(answer) == expected
    assert pair.events(since, "fallback")[0]["policy"] == "recompute"
    pair.forget()

    answer = pair.completion(TEXT, ignore_eos=True, kv_transfer_params=orphan)
    assert tokens(answer) == reference[1]
    pair.forget()

    # A restarted prefill begins with the tables that it had learned, and its consumer has them.
    sent = len(pair.tables_sent())
    pair.restart_prefill()
    again = pair.prefill_and_drop(TEXT)
    assert again["lynx"]["codec"] == "klt"
    assert again["lynx"]["tables"] == orphan["lynx"]["tables"]
    pair.forget()
    pair.assert_same(TEXT, ignore_eos=True)
    assert len(pair.tables_sent()) == sent
