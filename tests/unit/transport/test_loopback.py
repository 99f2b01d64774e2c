# SPDX-License-Identifier: Apache-2.0
"""Server and client over real UCX on loopback, both in one transport loop, on real tiers."""

import time

import numpy as np
import pytest
import torch
from lynx_kernels.shared.paged import PagedKVCache, PageIndex

from lynx_connector.codec import Tier
from lynx_connector.engine.metadata import LoadRequest
from lynx_connector.tiers.pieces import TierBuffers, TokenRange
from lynx_connector.transport.handshake import Identity
from lynx_connector.wire.messages import Prefilled
from lynx_connector.wire.secrets import SharedSecrets

from .pair import TOKENS, Pair, drain, inbound_of, receive, until


@pytest.mark.parametrize("first", [0, 1, 50, 84, 90, 99])
def test_every_row_arrives_unchanged_in_tier_order(pair, first):
    staged = pair.stage()
    inbound = pair.fetch(first=first)
    rows = receive(inbound)
    assert inbound.failure is None
    assert [r.tier for r in rows] == sorted(r.tier for r in rows)
    for piece in inbound.buffers.pieces:
        for tier, got in piece.rows.items():
            for source, tokens in staged.buffers.overlapping(piece.tokens):
                assert np.array_equal(got, source.view(tier, tokens))
    assert sum(inbound.wire_bytes.values()) == inbound.buffers.num_bytes


def test_many_transfers_at_once_share_one_connection(pair):
    names = [f"transfer-{i}" for i in range(8)]
    for name in names:
        pair.stage(name)
    for inbound in [pair.fetch(name) for name in names]:
        receive(inbound)
        assert inbound.refined
    assert pair.client.num_peers == 1
    assert pair.client.num_transfers == 0


def test_rows_are_sent_as_they_are_encoded(pair):
    staged = pair.stage(encoded=40)
    inbound = pair.fetch()
    until(lambda: drain(inbound) or inbound.written[Tier.ANCHOR] > 20)
    assert not inbound.anchored
    assert inbound.written[Tier.ANCHOR] <= 40
    pair.store.advance(staged, TOKENS)
    pair.loop.post(pair.server.notify)
    receive(inbound)
    assert inbound.refined


def test_unknown_transfer_is_refused(pair):
    inbound = pair.fetch("nobody")
    until(lambda: inbound.failure)
    assert "unknown transfer" in inbound.failure


def test_full_staging_tells_the_consumer(loop):
    pair = Pair(loop, limit=1000)
    assert pair.stage().dropped
    inbound = pair.fetch()
    until(lambda: inbound.failure)
    assert "staging is full" in inbound.failure
    assert pair.store.used_bytes == 0
    pair.close()


def test_expired_lease_tells_the_consumer_and_frees_the_staging(loop):
    pair = Pair(loop, lease=0.2)
    pair.stage()
    until(lambda: len(pair.store) == 0)
    inbound = pair.fetch()
    until(lambda: inbound.failure)
    assert "lease_seconds" in inbound.failure
    assert pair.store.used_bytes == 0
    pair.close()


def test_release_stops_the_transfer_and_frees_the_staging(loop):
    pair = Pair(loop, link_mbit=0.5)
    pair.stage()
    inbound = pair.fetch()
    until(lambda: drain(inbound))
    address = ("127.0.0.1", pair.server.port)
    pair.loop.post(pair.client.release, address, "t", "cancelled")
    until(lambda: pair.store.used_bytes == 0)
    seen = sum(inbound.written.values())
    time.sleep(0.3)
    drain(inbound)
    assert sum(inbound.written.values()) == seen
    assert pair.client.num_transfers == 0
    pair.close()


def test_producer_that_drops_a_transfer_between_frames_says_so(loop):
    pair = Pair(loop, link_mbit=0.5)
    pair.stage()
    inbound = pair.fetch()
    until(lambda: drain(inbound))
    pair.store.drop("t", "prefill died")
    until(lambda: inbound.failure)
    assert "prefill died" in inbound.failure
    pair.close()


def test_nobody_listens(pair):
    inbound = pair.fetch(port=1)
    until(lambda: inbound.failure, 20)
    assert "127.0.0.1:1" in inbound.failure


@pytest.mark.parametrize(
    ("consumer", "cause"),
    [
        (Identity("other model", "e/0"), "another model"),
        (Identity("compat", "e/0", SharedSecrets(values=(b"s" * 32,))), "no shared secret"),
    ],
)
def test_wrong_peers_are_refused_by_name(loop, consumer, cause):
    pair = Pair(loop, consumer=consumer)
    pair.stage()
    inbound = pair.fetch()
    until(lambda: inbound.failure)
    assert cause in inbound.failure
    assert pair.server.num_sessions == 0
    pair.close()


def test_corrupt_frame_is_caught(pair, monkeypatch):
    from lynx_connector.transport import sources

    monkeypatch.setattr(sources, "checksum", lambda payload: 7)
    pair.stage()
    inbound = pair.fetch()
    until(lambda: inbound.failure)
    assert "corrupt anchor frame at token 0" in inbound.failure
    until(lambda: pair.store.used_bytes == 0)


@pytest.mark.parametrize(
    "change",
    [
        {"first_token": 3},
        {"codec": "int8"},
        {"num_bytes": 10},
        {"num_tokens": 50},
        {"tier": 2},
        {"exceptions": 1},
    ],
)
def test_frames_that_do_not_fit_are_refused(pair, change):
    from lynx_connector.errors import TransferError
    from lynx_connector.wire import messages

    buffers = TierBuffers(pair.pieces())
    buffers.allocate()
    load = LoadRequest("r", "t", "h", [], "hadamard", 1, 16, TOKENS, 0, [], True)
    inbound = inbound_of(load, buffers, np.arange(TOKENS))
    good = {
        "transfer_id": "t",
        "tier": 0,
        "codec": "bf16",
        "first_token": 0,
        "num_tokens": 1,
        "num_bytes": pair.exact.bytes_per_token(Tier.ANCHOR),
        "checksum": 0,
    }
    assert inbound.buffer(messages.Frame(**good)).nbytes == good["num_bytes"]
    with pytest.raises(TransferError):
        inbound.buffer(messages.Frame(**good | change))


def test_decoded_cache_equals_a_local_round_trip(pair):
    """Encode here, send, decode there: the same as encode and decode in one place."""
    index = PageIndex.rows(16, 64, 128)

    def cache(seed):
        torch.manual_seed(seed)
        layers = {f"l{i}": torch.randn(8, 2, 16, 128) for i in range(2)}
        return PagedKVCache(layers, 16, 2, 64, index)

    source, target, local = cache(1), cache(2), cache(2)
    slots = np.arange(TOKENS, dtype=np.int64)
    staged = pair.stage()
    for piece, tokens in staged.buffers.overlapping(TokenRange(0, TOKENS)):
        piece.codec.encode(source, slots[tokens.start : tokens.end], piece.rows)
        rows = [piece.rows[tier] for tier in piece.codec.tiers]
        piece.codec.decode(rows, local, slots[tokens.start : tokens.end])
    inbound = pair.fetch()
    receive(inbound)
    for piece in inbound.buffers.pieces:
        rows = [piece.rows[tier] for tier in piece.codec.tiers]
        piece.codec.decode(rows, target, inbound.slots_for(piece.tokens))
    for layer in range(2):
        assert torch.equal(target.gather(layer, slots), local.gather(layer, slots))


@pytest.mark.parametrize("before", [True, False])
def test_first_token_reaches_the_consumer_whenever_it_comes(pair, before):
    staged = pair.stage(encoded=40)

    def settle():
        pair.store.settle(Prefilled("t", 42))
        pair.loop.post(pair.server.notify)

    if before:
        settle()
    inbound = pair.fetch()
    until(lambda: drain(inbound))
    if not before:
        assert inbound.take_first_token() is None
        settle()
    tokens = []
    until(lambda: tokens.append(inbound.take_first_token()) or tokens[-1] is not None)
    assert tokens[-1] == 42 and inbound.take_first_token() is None
    pair.store.advance(staged, TOKENS)
    pair.loop.post(pair.server.notify)
    receive(inbound)
    assert inbound.refined


@pytest.mark.parametrize("before", [True, False])
def test_prefill_that_fails_after_its_reply_fails_the_transfer_with_its_cause(pair, before):
    pair.stage(encoded=40)

    def settle():
        pair.store.settle(Prefilled("t", None, "prefill was aborted"))
        pair.loop.post(pair.server.notify)

    if before:
        settle()
    inbound = pair.fetch()
    if not before:
        until(lambda: drain(inbound))
        settle()
    until(lambda: inbound.failure)
    assert "prefill was aborted" in inbound.failure
    assert pair.store.used_bytes == 0
    until(lambda: pair.client.num_transfers == 0)


def test_prefill_that_failed_before_it_was_staged_leaves_its_cause(pair):
    pair.store.settle(Prefilled("never", None, "prefill was aborted"))
    inbound = pair.fetch("never")
    until(lambda: inbound.failure)
    assert "prefill was aborted" in inbound.failure
