# SPDX-License-Identifier: Apache-2.0
"""Tiers kept from an earlier prefill: what they save, that they are the same bytes, when not."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lynx_connector.codec import Tier
from lynx_connector.codec.table_store import store_tables
from lynx_connector.engine.metadata import EncodePlan
from lynx_connector.producer.reuse import BlockKey, EncodedBlock, EncodedBlocks
from lynx_connector.producer.worker import ENCODE_TOKENS

from .worker_pair import BLOCK, COMPAT, learned, noise_cache, values

TOKENS = 700
SLOTS = np.arange(TOKENS)
WHOLE = (TOKENS - 16) // BLOCK * BLOCK - 1
"""Tokens of full blocks before the exact tail, without token 0."""


def hashes(text="a", num_tokens=TOKENS):
    """As vLLM's: one a full block, which says what lies in it and before it."""
    return [f"{text}{block}".encode() for block in range(num_tokens // BLOCK)]


def poison(cache, token, layer, value=float("nan")):
    one = cache.gather(layer, np.array([token]))
    one[0, 1, 1, 5] = value
    cache.scatter(layer, np.array([token]), one)


def prefill(one, name, plan, fresh=0, named=None, chunk=300, num_tokens=TOKENS):
    """A prefill with tokens [0, fresh) from the prefix cache; reused tokens by chunk."""
    named = hashes() if named is None else named
    one.prefill(name, num_tokens, plan, chunk, hashes=named, fresh=fresh)
    one.finish(name)
    return [e["reused"] for e in one.events.named("chunk_encoded") if e["request"] == name]


def staged(one, name):
    """Everything that a consumer could be sent of a transfer."""
    transfer = one.worker._store.lookup("t-" + name)
    found = []
    for piece in transfer.buffers.pieces:
        found += [rows.tobytes() for _, rows in sorted(piece.rows.items())]
        raw = piece.raw_vectors(piece.tokens)
        found.append(raw.pack(0).tobytes() if raw is not None else b"")
        if piece.exact_bytes:
            run = piece.exact_run(piece.tokens)
            found += [run.lengths.tobytes(), run.data.tobytes()]
            assert run.tokens == piece.tokens
    one.worker._store.drop("t-" + name, "test")
    return found


@pytest.fixture(scope="module")
def tables():
    return [learned(noise_cache(2048, seed), 2048) for seed in (1, 2)]


@pytest.fixture
def warm(producer, tmp_path, tables):
    """A producer that has two versions of tables."""

    def make(**config):
        store_tables(tmp_path / "producer", COMPAT, 0, 1, tables[0], tokens=1 << 20)
        one = producer(**config)
        one.worker._tables.publish(tables[1], 1 << 20)
        return one

    return make


def plan_of(one, codec, tables, **options):
    return one.plan(codec, [tables[0].digest] if codec == "klt" else (), **options)


@pytest.mark.parametrize("chunk", [300, 256, 1000, 33])
@pytest.mark.parametrize(
    ("codec", "final_tier"),
    [
        ("hadamard", "residual"),
        ("hadamard", "exact"),
        ("klt", "residual"),
        ("klt", "exact"),
        ("int8", "residual"),
    ],
)
def test_reused_tiers_are_what_encoding_gives(warm, tables, codec, final_tier, chunk):
    one = warm()
    plan = plan_of(one, codec, tables, final_tier=final_tier)
    if codec != "int8":
        for token in (1, 15, 16, 299, 300, 683):
            poison(one.cache, token, token % 2)
    assert sum(prefill(one, "first", plan, chunk=chunk)) == 0
    once = staged(one, "first")
    assert sum(prefill(one, "second", plan, fresh=TOKENS, chunk=1000)) == WHOLE
    assert staged(one, "second") == once
    # Of blocks that lie in two chunks, nothing is reused.
    cut = {end // BLOCK for end in range(chunk, TOKENS, chunk) if end % BLOCK}
    lost = sum(BLOCK - (block == 0) for block in cut if block < (TOKENS - 16) // BLOCK)
    assert sum(prefill(one, "third", plan, fresh=TOKENS, chunk=chunk)) == WHOLE - lost
    assert staged(one, "third") == once


@pytest.mark.parametrize("final_tier", ["residual", "exact"])
def test_a_consumer_cannot_tell(warm, consumer, tables, final_tier):
    """Over real UCX, in small frames that end anywhere."""
    one, plan = warm(frame_bytes="64KiB"), None
    plan = plan_of(one, "klt", tables, final_tier=final_tier)
    poison(one.cache, 40, 1)
    caches = []
    for name, fresh in (("first", 0), ("second", 400)):
        reused = prefill(one, name, plan, fresh)
        other = consumer(folder=name)
        assert other.fetch(one.load(name, TOKENS, plan)) is None
        caches.append(values(other.cache, SLOTS).view(torch.uint8))
    assert sum(reused) == 400 // BLOCK * BLOCK - 1 - BLOCK  # the chunk's border is inside a block
    assert torch.equal(*caches)
    if final_tier == "exact":
        assert torch.equal(caches[1], values(one.cache, SLOTS).view(torch.uint8))


def test_a_prompt_that_shares_only_its_beginning(producer):
    one = producer()
    plan = one.plan()
    prefill(one, "first", plan)
    staged(one, "first")
    other = hashes()[:20] + hashes("b")[20:]
    one.cache.scatter(0, SLOTS[320:], one.cache.gather(0, SLOTS[320:]).neg())
    assert prefill(one, "second", plan, fresh=320, named=other, chunk=1000) == [319]
    now = staged(one, "second")
    assert prefill(one, "again", plan, named=hashes("c"), chunk=1000) == [0]
    assert staged(one, "again") == now


def test_what_was_computed_just_now_is_encoded_and_replaces(producer):
    one = producer()
    plan = one.plan()
    prefill(one, "first", plan)
    used = one.worker.gauges()["reuse_used_bytes"]
    assert used > 0
    assert prefill(one, "second", plan, fresh=0, chunk=1000) == [0]
    assert prefill(one, "third", plan, fresh=330, chunk=1000) == [319]
    assert one.worker.gauges()["reuse_used_bytes"] == used
    for name in ("first", "second", "third"):
        staged(one, name)


@pytest.mark.parametrize("final_tier", ["residual", "exact"])
def test_a_block_that_was_computed_anew_with_other_roundings_is_encoded(producer, final_tier):
    one = producer()
    plan = one.plan(final_tier=final_tier)
    for token in (63, 64, 70, 80):
        poison(one.cache, token, 0)
    prefill(one, "first", plan, chunk=1000)
    staged(one, "first")
    block = np.arange(64, 80)
    one.cache.scatter(1, block, one.cache.gather(1, block) * (1 + 2**-20))
    assert prefill(one, "second", plan, fresh=TOKENS, chunk=1000) == [WHOLE - BLOCK]
    now = staged(one, "second")
    assert prefill(one, "third", plan, fresh=TOKENS, chunk=1000) == [WHOLE]
    assert prefill(one, "other", plan, named=hashes("b"), chunk=1000) == [0]
    assert staged(one, "third") == staged(one, "other") == now


def test_other_ways_of_encoding_do_not_meet(warm, tables):
    one = warm()
    old, new = ([version.digest] for version in tables)
    plans = [
        one.plan("klt", old),
        one.plan("klt", new),
        one.plan("klt", old, anchor_bits=3),
        one.plan("klt", old, final_tier="exact"),
        one.plan("hadamard"),
        one.plan("int8"),
    ]
    for round_, reused in enumerate((0, WHOLE)):
        for number, plan in enumerate(plans):
            name = f"{number}/{round_}"
            assert prefill(one, name, plan, fresh=TOKENS, chunk=1000) == [reused]
            staged(one, name)


@pytest.mark.parametrize(
    ("config", "plan", "named"),
    [
        ({"reuse_bytes": 0}, {}, None),
        ({}, {"codec": "bf16"}, None),
        ({}, {}, []),
        ({}, {}, [b""] * (TOKENS // BLOCK)),
    ],
)
def test_nothing_is_kept(producer, config, plan, named):
    one = producer(**config)
    plan = one.plan(**plan)
    for name in ("first", "second"):
        assert sum(prefill(one, name, plan, fresh=TOKENS, named=named)) == 0
        staged(one, name)
    assert one.worker.gauges()["reuse_used_bytes"] == 0


def test_of_a_prompt_that_does_not_fit_the_beginning_stays(producer):
    """As vLLM frees a request's blocks from its end."""
    limit = 10 * BLOCK * 520
    one = producer(reuse_bytes=limit)
    plan = one.plan()
    for name, text in (("first", "a"), ("second", "b"), ("third", "b")):
        fresh = TOKENS if name == "third" else 0
        reused = prefill(one, name, plan, fresh, hashes(text), chunk=1000)
        staged(one, name)
        assert limit - BLOCK * 520 < one.worker.gauges()["reuse_used_bytes"] <= limit
    assert reused == [10 * BLOCK - 1]
    assert [key.block_hash for key in one.worker._kept._blocks] == hashes("b")[9::-1]


def test_a_prompt_of_hardly_any_tokens(producer):
    one = producer()
    plan = one.plan()
    for num_tokens in (1, 2, 16, 17, 32, 33):
        named = hashes(str(num_tokens), num_tokens)
        for fresh in (0, num_tokens):
            name = f"{num_tokens}/{fresh}"
            reused = prefill(one, name, plan, fresh, named, num_tokens=num_tokens)
            staged(one, name)
        lossy = num_tokens - 16
        assert reused == [max(0, lossy // BLOCK * BLOCK - 1)], num_tokens


PLAN = EncodePlan("hadamard", 4, "residual")
KEYS = [BlockKey(bytes([number]), PLAN) for number in range(5)]


def block(size, witness=b"w"):
    return EncodedBlock(witness, {Tier.ANCHOR: np.zeros((1, size), np.uint8)}, None, None)


@given(
    st.integers(0, 40),
    st.lists(st.tuples(st.sampled_from(KEYS), st.integers(0, 50), st.sampled_from([b"w", b"x"]))),
)
def test_the_least_recently_used_goes_first_and_the_bound_holds(limit, steps):
    """Against a list: find, then keep, as the encoder does."""
    blocks = EncodedBlocks(limit)
    model = []  # (key, block), the oldest first
    for key, size, witness in steps:
        kept = dict(model).get(key)
        found = blocks.find(key, witness)
        assert found is (kept if kept is not None and kept.witness == witness else None)
        new = found or block(size, witness)
        blocks.keep(key, new)
        model = [(k, b) for k, b in model if k != key]
        if new.num_bytes <= limit:
            model.append((key, new))
        while sum(b.num_bytes for _, b in model) > limit:
            model.pop(0)
        assert blocks.used_bytes == sum(b.num_bytes for _, b in model) <= limit
        assert len(blocks) == len(model)


def test_what_is_kept_owns_its_memory(warm, tables):
    """A view would hold the whole transfer's arrays beyond the bound."""
    one = warm()
    poison(one.cache, 20, 0)
    plan = plan_of(one, "klt", tables, final_tier="exact")
    prefill(one, "r", plan, chunk=33)
    staged(one, "r")
    for kept in one.worker._kept._blocks.values():
        arrays = [*kept.rows.values(), kept.exact.lengths, kept.exact.data]
        if kept.raw is not None:
            arrays += dataclasses.astuple(kept.raw)
        assert all(array.base is None for array in arrays)
        assert sum(array.nbytes for array in arrays) == kept.num_bytes
    assert any(kept.raw is not None for kept in one.worker._kept._blocks.values())


def test_a_long_chunk_is_sent_in_parts_of_whole_blocks(producer, consumer):
    """All of a prefix-cached prompt is one chunk: its first tokens need not wait for the last."""
    tokens = 3000
    one, other = producer(), consumer()
    plan = one.plan()
    one.prefill("r", tokens, plan, chunk=tokens)
    one.finish("r")
    transfer = one.worker._store.lookup("t-r")
    ends = [encoded for encoded, _ in transfer.ready_since]
    assert len(ends) == -(-tokens // ENCODE_TOKENS)
    assert ends[-1] == tokens
    assert not any(end % BLOCK for end in ends[:-1])
    assert other.fetch(one.load("r", tokens, plan)) is None
