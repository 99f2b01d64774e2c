# SPDX-License-Identifier: Apache-2.0
"""Every parser that a peer, a router or a client reaches: only Lynx's own errors come out, and a
length that is claimed is checked before it is believed."""

import json
import tracemalloc

import msgspec
import numpy as np
import pytest
import torch
from lynx_kernels.shared.paged import PagedKVCache, PageIndex

from lynx_connector.codec import KVGeometry, Tier, get_codec
from lynx_connector.codec.klt_learner import TableLearner
from lynx_connector.codec.klt_tables import KltTables
from lynx_connector.codec.table_store import CURRENT, TableStore
from lynx_connector.codec.types import CodecError
from lynx_connector.consumer.bootstrap import MAX_ANSWER_BYTES
from lynx_connector.consumer.budget import Reservation, StagingBudget
from lynx_connector.consumer.inbound import InboundTransfer
from lynx_connector.engine.metadata import LoadRequest
from lynx_connector.errors import LynxError, ProtocolError, TransferError
from lynx_connector.tiers.pieces import TierBuffers, plan_pieces
from lynx_connector.tiers.raw_vectors import record_bytes
from lynx_connector.wire import messages
from lynx_connector.wire.handoff import (
    check_transfer_id,
    parse_answer,
    parse_handoff,
    parse_mooncake_leg,
)
from tests.unit import objects

from .mutator import INPUTS, Mutator, survive

FEW = max(INPUTS // 20, 1)
PEAK = 8 << 20
"""Bytes that no input may make a parser allocate: well above what real traffic needs here."""


def bounded(draw, parse, refusals):
    """`survive`, under watch of memory; some inputs only, since watching is slow."""

    def measured(one):
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        try:
            parse(one)
        finally:
            peaks.append(tracemalloc.get_traced_memory()[1] - before)

    peaks: list[int] = []
    tracemalloc.start()
    try:
        survive(draw, measured, refusals, FEW)
    finally:
        tracemalloc.stop()
    assert max(peaks) < PEAK, (max(peaks), peaks.index(max(peaks)))


# ---- control messages ---------------------------------------------------------------------------

MESSAGES = [
    messages.Hello(3, "0.1.0", "model:00|config:00|cache:00", "engine/0", bytes(32)),
    messages.Welcome(3, "0.1.0", "compat", "engine/0", bytes(32), bytes(32), bytes(32)),
    messages.Proof(bytes(32)),
    messages.Ready(bytes(300), bytes(8), "7700-7731", "0" * 32),
    messages.Join(bytes(300), bytes(8)),
    messages.Joined(),
    messages.Refused("peer has another model"),
    messages.Fetch("t", 16, 2000, 12.5),
    messages.Release("t", "done"),
    messages.Failure("t", "unknown transfer"),
    messages.Prefilled("t", 42),
    messages.Prefilling(),
    messages.Sent("t"),
    messages.Taken(),
    messages.Hold(["t", "u"]),
    messages.Sent("t"),
    messages.TablesRequest("0" * 32),
    messages.Tables("0" * 32, 12345, 1 << 63),
    messages.NoTables("0" * 32, "gone"),
    messages.Frame("t", 1, "klt", 16, 100, 123456, 1 << 63, 3),
]
TREES = [msgspec.msgpack.decode(msgspec.msgpack.encode(one)) for one in MESSAGES]


def prefixed(body: bytes, length: int | None = None) -> bytes:
    return messages.PREFIX.pack(b"LYNX", len(body) if length is None else length) + body


def control(mutator: Mutator) -> bytes:
    tree = mutator.random.choice(TREES)
    what = mutator.random.randrange(4)
    if what <= 1:
        return prefixed(msgspec.msgpack.encode(mutator.tree(tree)))
    if what == 2:
        body = mutator.bytes(msgspec.msgpack.encode(tree))
        return prefixed(body, mutator.random.choice((None, None, 1024, 1025, 1 << 31, 0)))
    return mutator.bytes(prefixed(msgspec.msgpack.encode(tree)))


def read_message(sent: bytes) -> messages.AnyMessage:
    """As `MessageStream.read` does; a stream that ends too early is refused by its reader."""
    head, rest = sent[: messages.PREFIX.size], sent[messages.PREFIX.size :]
    if len(head) < messages.PREFIX.size:
        raise ProtocolError("closed in the middle of a message")
    return messages.decode(rest[: messages.length_of(head, messages.GREETING_BYTES)])


def test_control_messages():
    accepted, refused = survive(control, read_message, ProtocolError)
    assert accepted and refused
    bounded(control, read_message, ProtocolError)


def test_what_is_understood_can_be_said_again():
    """No field passes that its own encoder, a log or a file could not take."""

    def parse(one):
        message = read_message(one)
        assert messages.decode(messages.encode(message)) == message
        for value in msgspec.structs.asdict(message).values():
            str(value).encode()

    survive(control, parse, ProtocolError, FEW)


# ---- what routers carry -------------------------------------------------------------------------


def handoff(mutator: Mutator):
    lynx = mutator.random.choice(({}, {"codec": "klt", "tables": ["0" * 32]}, {"early": True}))
    return mutator.tree(objects.handoff(**lynx))


def read_handoff(params):
    if isinstance(params, dict):  # vLLM's own model of a request refuses others
        parsed = parse_handoff(params)
        assert parsed.address(0)
        messages.encode(messages.Fetch(parsed.transfer_id, 0, parsed.lynx.num_tokens))
        assert json.loads(msgspec.json.encode(parsed.params()))


def test_handoffs():
    accepted, refused = survive(handoff, read_handoff, ProtocolError)
    assert accepted and refused
    bounded(handoff, read_handoff, ProtocolError)


LEG = {
    "do_remote_prefill": True,
    "transfer_id": "cmpl-1",
    "remote_engine_id": "engine",
    "remote_bootstrap_addr": "http://10.0.0.1:8998",
}


def read_leg(params):
    if isinstance(params, dict):
        parse_mooncake_leg(params)
        check_transfer_id(params.get("transfer_id"))


def test_mooncake_legs():
    accepted, refused = survive(lambda m: m.tree(LEG), read_leg, ProtocolError)
    assert accepted and refused


ANSWERS = [
    {"state": "pending"},
    {"state": "failed", "cause": "gone"},
    {"state": "ready", "handoff": objects.handoff()},
]


def answer(mutator: Mutator) -> bytes:
    tree = mutator.random.choice(ANSWERS)
    body = json.dumps(mutator.tree(tree) if mutator.random.randrange(2) else tree).encode()
    if mutator.random.randrange(50) == 0:
        return body[:-1] + b',"x":' + mutator.random.choice((b"[", b'{"a":')) * 9000
    return body if mutator.random.randrange(2) else mutator.bytes(body)


def read_answer(body):
    body = body[:MAX_ANSWER_BYTES]  # where the client stops reading
    said = parse_answer(body)
    if said.handoff is not None:
        read_handoff(said.handoff)


def test_bootstrap_answers():
    accepted, refused = survive(answer, read_answer, ProtocolError)
    assert accepted and refused
    bounded(answer, read_answer, ProtocolError)


# ---- tables -------------------------------------------------------------------------------------

SMALL = KVGeometry(1, 1, 64, "float32")


@pytest.fixture(scope="module")
def stored():
    page = torch.randn(64, 1, 16, 128, generator=torch.Generator().manual_seed(1))
    cache = PagedKVCache({"a": page}, 16, 1, 64, PageIndex.rows(16, 64, 128))
    learner = TableLearner(SMALL)
    learner.observe(cache, np.arange(1024), 0)
    return learner.build().to_bytes()


def tables(stored):
    tree = msgspec.msgpack.decode(stored)

    def draw(mutator: Mutator) -> bytes:
        if mutator.random.randrange(2):
            return mutator.bytes(stored)
        return msgspec.msgpack.encode(mutator.tree(tree))

    return draw


def test_tables(stored):
    def parse(data):
        found = KltTables.from_bytes(data, SMALL)
        found.check()

    accepted, refused = survive(tables(stored), parse, CodecError)
    assert accepted and refused
    bounded(tables(stored), parse, CodecError)


def test_files_of_tables_are_used_or_ignored(stored, tmp_path):
    digest = KltTables.from_bytes(stored, SMALL).digest
    current = msgspec.msgpack.decode(msgspec.msgpack.encode({"digest": digest, "tokens": 7}))
    files = tables(stored)
    folder = TableStore(tmp_path, "key", 0, 1, SMALL).folder
    folder.mkdir(parents=True)

    def draw(mutator: Mutator):
        table = files(mutator) if mutator.random.randrange(2) else stored
        body = json.dumps(mutator.tree(current)).encode()
        return table, mutator.bytes(body) if mutator.random.randrange(2) else body

    def parse(pair):
        (folder / f"{digest}.tables").write_bytes(pair[0])
        (folder / CURRENT).write_bytes(pair[1])
        store = TableStore(tmp_path, "key", 0, 1, SMALL)
        assert (found := store.load_current()) is None or found[0].digest == digest
        assert (same := store.load(digest)) is None or same.digest == digest

    survive(draw, parse, (), max(FEW // 2, 1))


# ---- frames -------------------------------------------------------------------------------------

GEOMETRY = KVGeometry(2, 2, 64, "float32")
CODEC, RAW = get_codec("hadamard", GEOMETRY), get_codec("bf16", GEOMETRY)
TOKENS, BUDGET = 60, 1 << 20
RECORD = record_bytes(64 * 4)


def frames() -> list[dict]:
    """A whole transfer: token 0 exact, the others in three tiers, two frames a tier."""
    found = [("bf16", 0, 0, 1, 0)]
    for tier in (0, 1, 2):
        found += [("hadamard", tier, 1, 20, 2 if tier == 0 else 0), ("hadamard", tier, 21, 39, 0)]
    trees = []
    for codec, tier, first, count, exceptions in found:
        if tier == 2:
            size = 4 * count + 10 * count
        else:
            width = {"hadamard": CODEC, "bf16": RAW}[codec].bytes_per_token(Tier(tier))
            size = count * width + exceptions * RECORD
        frame = messages.Frame("t", tier, codec, first, count, size, 0, exceptions)
        trees.append(msgspec.to_builtins(frame))
    return trees


FRAMES = frames()


def transfer(mutator: Mutator):
    """A transfer's frames with some changed, left out, doubled or moved, and payloads."""
    trees = list(FRAMES)
    for _ in range(mutator.random.choice((0, 1, 1, 2, 4))):
        at = mutator.random.randrange(len(trees))
        what = mutator.random.randrange(5)
        if what <= 1:
            trees[at] = mutator.tree(trees[at], 1)
        elif what == 2:
            trees.insert(mutator.random.randrange(len(trees)), trees[at])
        elif what == 3 and len(trees) > 1:
            del trees[at]
        else:
            mutator.random.shuffle(trees)
    return trees, mutator.random.randrange(4), mutator.random.getrandbits(32)


def payload(frame, buffer, kind, rng):
    """Zeros, noise, or what the frame's tier ought to carry."""
    if kind == 0:
        buffer[:] = 0
    elif kind == 1:
        buffer[:] = rng.integers(0, 256, buffer.shape, np.uint8)
    elif frame.tier == 2:
        buffer[:] = 0
        room = max(buffer.nbytes - 4 * frame.num_tokens, 0)
        lengths = np.full(frame.num_tokens, room // frame.num_tokens, "<u4")
        lengths[-1] += room - int(lengths.sum()) + (kind == 3)
        buffer[: lengths.nbytes] = lengths.view(np.uint8)[: buffer.nbytes]
    else:
        buffer[:] = 0
        for index in range(frame.exceptions):
            start = buffer.nbytes - (frame.exceptions - index) * RECORD
            where = np.array([index % frame.num_tokens, index], "<u4").view(np.uint8)
            if start >= 0:
                buffer[start : start + 8] = where


def receive(drawn):
    trees, kind, seed = drawn
    rng = np.random.default_rng(seed)
    budget = StagingBudget(BUDGET)
    buffers = TierBuffers(plan_pieces(TOKENS, 0, 1, 0, CODEC, RAW, exact_tier=True))
    load = LoadRequest("r", "t", "h", [], "hadamard", 1, 0, TOKENS, 0, [], True)
    reservation = Reservation.take(budget, buffers.num_bytes, buffers.spare_bytes)
    buffers.allocate()
    inbound = InboundTransfer(load, buffers, np.arange(TOKENS), GEOMETRY, reservation)
    try:
        for tree in trees:
            try:
                frame = messages.decode(msgspec.msgpack.encode(tree))
            except ProtocolError:
                continue
            if not isinstance(frame, messages.Frame) or frame.transfer_id != "t":
                continue  # the connection, and the client's list of transfers, keep them away
            buffer = inbound.buffer(frame)
            assert buffer.nbytes == frame.num_bytes <= BUDGET
            payload(frame, buffer, kind, rng)
            inbound.landed(frame, buffer)
            assert budget.used <= budget.limit
    finally:
        for tier, tokens in inbound._here.items():
            assert 0 <= tokens <= TOKENS, tier
        reservation.close()
        assert budget.used == 0  # whatever came, the memory is given back


def test_frames():
    accepted, refused = survive(transfer, receive, TransferError, max(INPUTS // 4, 1))
    assert accepted and refused
    bounded(transfer, receive, TransferError)


def test_all_errors_are_ours():
    assert issubclass(CodecError, LynxError)
    assert issubclass(TransferError, LynxError) and issubclass(ProtocolError, LynxError)
