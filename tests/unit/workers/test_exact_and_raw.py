# SPDX-License-Identifier: Apache-2.0
"""The exact tier and vectors that travel raw, from one worker's cache to the other's."""

import numpy as np
import pytest
import torch

from lynx_connector.codec import CodecError
from lynx_connector.codec.exact import ExactTier

from .worker_pair import changed, until, values

TOKENS = 700
SLOTS = np.arange(TOKENS)


def bits(cache):
    return values(cache, SLOTS).view(torch.uint8)


def poison(cache, token, vector, value):
    """Put a value into one element of (layer, K or V, head)."""
    layer, kv, head = vector // 4, vector // 2 % 2, vector % 2
    one = cache.gather(layer, np.array([token]))
    one[0, kv, head, 5] = value
    cache.scatter(layer, np.array([token]), one)


def send(one, other, plan, name="r", **load):
    one.prefill(name, TOKENS, plan, chunk=300)
    cause = other.fetch(changed(one.load(name, TOKENS, plan), **load))
    one.finish(name)
    return cause


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("speculative", [True, False])
def test_with_the_exact_tier_every_bit_arrives(producer, consumer, dtype, speculative):
    one, other = producer(dtype=dtype), consumer(dtype=dtype)
    poison(one.cache, 1, 0, float("nan"))
    poison(one.cache, 299, 7, float("inf"))
    poison(one.cache, 300, 3, -0.0)
    poison(one.cache, 301, 3, 1e-40)
    assert send(one, other, one.plan(final_tier="exact"), speculative=speculative) is None
    assert torch.equal(bits(other.cache), bits(one.cache))
    sent = [e["tier"] for e in one.events.named("tier_sent")]
    assert sent == ["anchor", "residual", "exact"]


def test_its_kernels_are_compiled_at_start_up(producer, consumer, monkeypatch):
    """At the first exact transfer it would hold up the engine's step, for seconds."""
    compiled = []
    monkeypatch.setattr(ExactTier, "warmup", lambda tier, cache: compiled.append(cache))
    other = consumer()  # a handoff decides, not the configuration
    producer()
    one = producer(folder="exact", final_tier="exact")
    assert compiled == [other.cache, one.cache]


def test_exact_behind_a_local_prefix(producer, consumer):
    one, other = producer(), consumer()
    plan = one.plan(final_tier="exact")
    one.prefill("r", TOKENS, plan, chunk=300)
    assert other.fetch(one.load("r", TOKENS, plan, first_token=333 // 16 * 16)) is None
    one.finish("r")
    here = np.arange(320, TOKENS)
    assert torch.equal(values(other.cache, here), values(one.cache, here))


def test_exact_of_a_codec_that_is_exact_adds_nothing(producer, consumer):
    one, other = producer(codec="bf16"), consumer()
    assert send(one, other, one.plan("bf16", final_tier="exact")) is None
    assert torch.equal(bits(other.cache), bits(one.cache))
    assert [e["tier"] for e in one.events.named("tier_sent")] == ["anchor"]


@pytest.mark.parametrize("speculative", [True, False])
def test_raw_vectors_arrive_and_the_rest_is_untouched(producer, consumer, speculative):
    one, other = producer(), consumer()
    assert send(one, other, one.plan(), "clean", speculative=speculative) is None
    clean = values(other.cache, SLOTS).clone()
    wrong = [(1, 0), (1, 7), (299, 3), (300, 3), (683, 5)]
    for token, vector in wrong:
        poison(one.cache, token, vector, float("nan") if vector == 3 else float("-inf"))
    assert send(one, other, one.plan(), "poisoned", speculative=speculative) is None
    now = values(other.cache, SLOTS)
    for token, vector in wrong:
        layer, kv, head = vector // 4, vector // 2 % 2, vector % 2
        source = one.cache.gather(layer, np.array([token]))[0, kv, head]
        assert torch.equal(now[token, layer, kv, head].view(torch.int32), source.view(torch.int32))
        now[token, layer, kv, head] = clean[token, layer, kv, head]
    assert torch.equal(now, clean)


def test_a_cache_of_nothing_but_nan(producer, consumer):
    one, other = producer(), consumer()
    for layer in range(2):
        one.cache.scatter(layer, SLOTS, torch.full((TOKENS, 2, 2, 64), float("nan")))
    assert send(one, other, one.plan()) is None
    assert torch.equal(bits(other.cache), bits(one.cache))
    assert other.worker._budget.used == 0


def test_exact_tier_that_does_not_fit_its_checksum_fails_the_transfer(
    producer, consumer, monkeypatch
):
    """Never a wrong token: the request falls back, and the cause is told."""
    encode = ExactTier.encode

    def corrupt(self, *args):
        data, lengths = encode(self, *args)
        data = data.copy()
        data[len(data) // 2] ^= 4
        return data, lengths

    monkeypatch.setattr(ExactTier, "encode", corrupt)
    one, other = producer(), consumer()
    cause = send(one, other, one.plan(final_tier="exact"))
    assert cause
    assert "r" in other.failed
    assert "r" not in other.refined


def test_exact_tier_larger_than_estimated_finds_no_room(producer, consumer, monkeypatch):
    monkeypatch.setattr("lynx_connector.tiers.pieces.EXACT_ESTIMATE_BITS", {"float32": 1})
    one, other = producer(), consumer()
    plan = one.plan(final_tier="exact")
    one.prefill("warm", TOKENS, plan)
    one.finish("warm")
    before = one.worker._store.used_bytes
    one.worker._store.drop("t-warm", "test")
    one.worker._store._limit = before - 1000
    cause = send(one, other, plan)
    assert "staging is full" in cause
    assert one.worker._store.used_bytes == 0


def test_consumer_without_room_for_the_exact_tier(producer, consumer, monkeypatch):
    monkeypatch.setattr("lynx_connector.tiers.pieces.EXACT_ESTIMATE_BITS", {"float32": 1})
    one, other = producer(), consumer()
    plan = one.plan(final_tier="exact")
    one.prefill("r", TOKENS, plan, chunk=300)
    other.step(loads=[one.load("r", TOKENS, plan)])
    other.worker._budget.limit = other.worker._budget.used + 100
    cause = other.settle("r")
    one.finish("r")
    assert cause is None or "staging is full" in cause
    assert cause is not None
    until(lambda: other.worker._budget.used == 0)


def test_exact_is_refused_for_codecs_of_one_tier():
    from lynx_connector.codec import get_codec

    from .worker_pair import geometry

    with pytest.raises(CodecError):
        ExactTier(get_codec("int8", geometry()))
