# SPDX-License-Identifier: Apache-2.0
"""Whatever the frame size, the progress of the prefill and the order in which streams are served:
the receiver accepts every frame and ends with the sender's bytes."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lynx_connector.codec import KVGeometry, Tier, get_codec
from lynx_connector.consumer.budget import Reservation, StagingBudget
from lynx_connector.consumer.inbound import InboundTransfer
from lynx_connector.engine.metadata import LoadRequest
from lynx_connector.tiers.outbound import TierStream
from lynx_connector.tiers.pieces import ExactRun, TierBuffers, TokenRange, plan_pieces
from lynx_connector.tiers.raw_vectors import RawVectors
from lynx_connector.tiers.staging import StagedTransfer
from lynx_connector.wire import messages

GEOMETRY = KVGeometry(1, 1, 64, "float32")
CODEC, RAW = get_codec("hadamard", GEOMETRY), get_codec("bf16", GEOMETRY)
TOKENS = 90


def buffers(first=0):
    pieces = plan_pieces(TOKENS, first, 1, 16, CODEC, RAW, exact_tier=True)
    made = TierBuffers(pieces)
    made.allocate()
    return made


class FakePrefill:
    """Stages noise for chunk after chunk, with raw vectors and exact tokens of any length."""

    def __init__(self, rng):
        self.rng = rng
        self.transfer = StagedTransfer("t", "r", TOKENS, buffers())

    def encode(self, count):
        chunk = TokenRange(self.transfer.encoded, min(TOKENS, self.transfer.encoded + count))
        for piece, tokens in self.transfer.buffers.overlapping(chunk):
            for tier in piece.codec.tiers:
                view = piece.view(tier, tokens)
                view[:] = self.rng.integers(0, 255, view.shape, np.uint8)
            if not piece.exact_bytes:
                continue
            lengths = self.rng.integers(0, 300, len(tokens)).astype(np.uint32)
            data = self.rng.integers(0, 255, int(lengths.sum()), np.uint8)
            piece.exact_runs.append(ExactRun(tokens, lengths, data))
            keys = np.flatnonzero(self.rng.random(2 * len(tokens)) < 0.1)
            if len(keys):
                raw = self.rng.integers(0, 255, (len(keys), 256), np.uint8)
                piece.raw.append(RawVectors(keys // 2 + tokens.start, keys % 2, raw))
        self.transfer.encoded = chunk.end


def receive(inbound, stream, out):
    frame = messages.Frame(
        "t", int(stream.tier), out.codec, out.tokens.start, len(out.tokens), out.payload.nbytes, 0,
        out.exceptions,
    )  # fmt: skip
    frame = messages.decode(messages.encode(frame))
    buffer = inbound.buffer(frame)
    buffer[:] = out.payload
    return inbound.landed(frame, buffer)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 1000),
    first=st.sampled_from([0, 1, 2, 40, 73, 74, 89]),
    frame_bytes=st.integers(1, 8192),
    chunk=st.integers(1, TOKENS),
)
def test_all_bytes_arrive_in_an_order_that_can_be_decoded(seed, first, frame_bytes, chunk):
    rng = np.random.default_rng(seed)
    prefill = FakePrefill(rng)
    sent = prefill.transfer
    streams, coarser = [], None
    for tier in sent.buffers.tiers:
        coarser = TierStream(sent, tier, first, coarser)
        streams.append(coarser)
    budget = StagingBudget(1 << 30)
    load = LoadRequest("r", "t", "h", [], "hadamard", 1, 16, TOKENS, first, [], True)
    inbound = InboundTransfer(
        load, buffers(first), np.arange(TOKENS - first), GEOMETRY, Reservation.take(budget, 0)
    )
    complete, exact = False, {}
    while not complete:
        ready = [stream for stream in streams if not stream.finished and stream.ready]
        if sent.encoded < TOKENS and (not ready or rng.random() < 0.3):
            prefill.encode(chunk)
            continue
        stream = ready[rng.integers(len(ready))]
        complete = receive(inbound, stream, stream.take(frame_bytes))
        while rows := inbound.take_landed():
            inbound.mark_written(rows)
            if rows.exact is not None:
                ends = np.cumsum(rows.exact.lengths)[:-1]
                parts = np.split(rows.exact.data, ends)
                exact |= dict(zip(range(*rows.tokens), parts, strict=True))
    assert inbound.refined
    assert all(stream.finished for stream in streams)
    for piece in inbound.buffers.pieces:
        for source, tokens in sent.buffers.overlapping(piece.tokens):
            for tier in piece.codec.tiers:
                assert np.array_equal(piece.view(tier, tokens), source.view(tier, tokens))
            ours, theirs = piece.raw_vectors(tokens), source.raw_vectors(tokens)
            assert (ours is None) == (theirs is None)
            if ours is not None:
                assert ours.pack(0).tobytes() == theirs.pack(0).tobytes()
    for piece in sent.buffers.pieces:
        for run in piece.exact_runs:
            parts = np.split(run.data, np.cumsum(run.lengths)[:-1])
            for token, part in zip(range(*run.tokens), parts, strict=True):
                if token >= first:
                    assert np.array_equal(exact[token], part)
    inbound.reservation.close()
    assert budget.used == 0
    assert sent.buffers.num_bytes >= sum(map(len, exact.values()))


def test_tier_numbers_are_those_of_the_protocol():
    assert [int(tier) for tier in Tier] == [0, 1, 2]
