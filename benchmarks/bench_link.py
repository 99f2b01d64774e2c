# SPDX-License-Identifier: Apache-2.0
"""How long a late anchor waits behind queued residuals on a link of limited rate.

    python benchmarks/bench_link.py [--mbit 100 200] [--probes 15] [--encrypt]

A producer (staging and server, no model) and a consumer, each in a network namespace of its own
(as root; else loopback with the sender's own limit). While the residuals of long transfers fill the
link, short transfers are fetched, over the same connection and over another one. Printed, in
milliseconds: fetch to first anchor frame and to the whole anchor, on the idle and on the full link,
beside the time that one frame of `frame_bytes` takes; and what the full link carried.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

from lynx_connector.codec import KVGeometry, get_codec
from lynx_connector.telemetry.events import EventLog
from lynx_connector.testbed.link import open_link
from lynx_connector.tiers.pieces import TierBuffers, plan_pieces
from lynx_connector.tiers.staging import StagedTransfer, StagingStore
from lynx_connector.transport.client import TierClient
from lynx_connector.transport.handshake import Identity
from lynx_connector.transport.loop import TransportLoop
from lynx_connector.transport.server import TierServer
from lynx_connector.wire import messages
from lynx_connector.wire.secrets import SharedSecrets

GEOMETRY = KVGeometry(num_layers=30, num_kv_heads=3, head_dim=64, dtype="bfloat16")
IDENTITY = Identity("bench", "bench/0")
SEALED = Identity("bench", "bench/0", SharedSecrets(values=(b"not a secret: a benchmark",)), True)
NO_EVENTS = EventLog(None, "bench")
BULK_TOKENS, LATE_TOKENS = 2048, 48
BULKS = 64
LATES = 200
TIMEOUT = 120.0


def produce(identity: Identity, frame_bytes: int, mbit: float) -> None:
    """Serve bulk-0..., late-0... until standard input ends; the port goes to standard output."""
    loop = TransportLoop("tcp,self")
    loop.start()
    store = StagingStore(8 << 30, 3600, NO_EVENTS)
    codec, exact = get_codec("hadamard", GEOMETRY), get_codec("bf16", GEOMETRY)
    names = [(f"bulk-{i}", BULK_TOKENS) for i in range(BULKS)]
    names += [(f"late-{i}", LATE_TOKENS) for i in range(LATES)]
    shared: dict[int, TierBuffers] = {}
    for name, tokens in names:
        buffers = shared.get(tokens) or TierBuffers(plan_pieces(tokens, 0, 0, 0, codec, exact))
        transfer = StagedTransfer(name, name, tokens, buffers)
        store.open(transfer)
        for piece in buffers.pieces:
            for rows in piece.rows.values():
                rows[:] = 1
        shared[tokens] = buffers
        store.advance(transfer, tokens)
    server = TierServer(store, identity, NO_EVENTS, frame_bytes, mbit)
    loop.run(server.start(0))
    print(server.port, flush=True)
    sys.stdin.read()
    loop.run(server.stop())
    loop.stop()


class Arrivals:
    """A sink that keeps the times of its frames."""

    tables = ""

    def __init__(self, name: str, tokens: int):
        self.transfer_id = name
        self.tokens = tokens
        self.frames: list[tuple[float, int, int]] = []
        """Time, tier, bytes."""
        self.anchored_at = 0.0
        self.done = False

    def buffer(self, frame: messages.Frame) -> np.ndarray:
        return np.empty(frame.num_bytes, np.uint8)

    def landed(self, frame: messages.Frame, payload: np.ndarray) -> bool:
        now = time.monotonic()
        self.frames.append((now, frame.tier, frame.num_bytes))
        last = frame.first_token + frame.num_tokens == self.tokens
        if last and frame.tier == 0:
            self.anchored_at = now
        self.done = last and frame.tier == 1
        return self.done

    def failed(self, cause: str) -> None:
        raise RuntimeError(cause)


class NoTables:
    max_bytes = 0

    def known(self, digest: str) -> bool:
        return True

    def accept(self, digest: str, data: np.ndarray) -> None:
        raise AssertionError("hadamard needs no tables: none are asked for")


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the link is stuck")
        time.sleep(0.002)


class Consumer:
    """Two connections to one producer."""

    def __init__(self, identity: Identity, host: str, port: int):
        self.loop = TransportLoop("tcp,self")
        self.loop.start()
        self.address = (host, port)
        self.clients = [TierClient(identity, TIMEOUT, NoTables()) for _ in range(2)]
        self.late = 0

    def fetch(self, client: int, name: str, tokens: int) -> Arrivals:
        sink = Arrivals(name, tokens)
        self.loop.post(self.clients[client].fetch, self.address, sink, 0, tokens)
        return sink

    def probe(self, client: int, *, idle: bool = False) -> tuple[float, float]:
        """Milliseconds to the first frame and to the whole anchor of a short transfer.

        idle: leave the link idle again.
        """
        started = time.monotonic()
        sink = self.fetch(client, f"late-{self.late}", LATE_TOKENS)
        self.late += 1
        until(lambda: sink.done if idle else sink.anchored_at)
        return 1e3 * (sink.frames[0][0] - started), 1e3 * (sink.anchored_at - started)


def consume(identity: Identity, host: str, port: int, probes: int) -> dict:
    """Run all probes; one dict for a link."""
    consumer = Consumer(identity, host, port)
    rows: dict[str, list[tuple[float, float]]] = {}
    for client in (0, 1):
        consumer.probe(client, idle=True)  # connects
    rows["idle link"] = [consumer.probe(0, idle=True) for _ in range(probes)]
    bulks: list[Arrivals] = []
    sleeper = random.Random(1)
    for name, client in (("same connection", 0), ("another connection", 1)):
        rows[name] = []
        while len(rows[name]) < probes:
            if not bulks or bulks[-1].done:
                bulks.append(consumer.fetch(0, f"bulk-{len(bulks)}", BULK_TOKENS))
                until(lambda: bulks[-1].anchored_at)
            time.sleep(sleeper.uniform(0.02, 0.12))
            if bulks[-1].done:
                continue
            row = consumer.probe(client)
            if not bulks[-1].done:
                rows[name].append(row)
    until(lambda: bulks[-1].done)
    full = consumer.fetch(0, f"bulk-{len(bulks)}", BULK_TOKENS)
    until(lambda: full.done)
    sent = sum(size for _, _, size in full.frames[1:])
    seconds = full.frames[-1][0] - full.frames[0][0]
    consumer.loop.stop()
    return {"rows": rows, "mbit": sent * 8e-6 / seconds, "frames": len(full.frames)}


def throughput(identity: Identity, host: str, port: int) -> dict:
    """What one connection carries of many transfers in a row."""
    consumer = Consumer(identity, host, port)
    consumer.probe(0, idle=True)  # connects
    began = time.monotonic()
    bulks = [consumer.fetch(0, f"bulk-{i}", BULK_TOKENS) for i in range(BULKS)]
    until(lambda: all(bulk.done for bulk in bulks))
    seconds = time.monotonic() - began
    frames = [size for bulk in bulks for _, _, size in bulk.frames]
    return {"rows": {}, "mbit": sum(frames) * 8e-6 / seconds, "frames": len(frames)}


def measure(
    mbit: float, frame_bytes: int, probes: int, encrypt: bool, only_throughput: bool
) -> None:
    here = [sys.executable, __file__, "--frame-bytes", str(frame_bytes)]
    if encrypt:
        here.append("--encrypt")
    if only_throughput:
        here.append("--throughput")
    with open_link(mbit) as link:
        environment = os.environ | {"UCX_WARN_UNUSED_ENV_VARS": "n"}
        producing = subprocess.Popen(
            [*link.prefill.prefix, *here, "--role", "producer", "--mbit", str(link.sender_mbit)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment | {"UCX_NET_DEVICES": link.prefill.kv_device},
        )
        assert producing.stdout is not None
        try:
            port = producing.stdout.readline().strip()
            where = [*here, "--role", "consumer", "--probes", str(probes)]
            found = subprocess.run(
                [*link.decode.prefix, *where, "--host", link.prefill.kv_host, "--port", port],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
                env=environment | {"UCX_NET_DEVICES": link.decode.kv_device},
            )
        finally:
            producing.communicate("")
        result = json.loads(found.stdout.splitlines()[-1])
        rate = f"{result['mbit']:.0f} Mbit/s in {result['frames']} frames"
        print(f"\n{link.note}; full link carried {rate}; {frame_bytes >> 10} KiB take", end=" ")
        print(f"{frame_bytes * 8e-3 / mbit:.0f} ms" if mbit else "no time")
        if only_throughput:
            return
        print(f"{'late anchor':<20}{'first frame':>24}{'whole anchor':>24}   (ms: median, worst)")
        for name, rows in result["rows"].items():
            columns = [
                f"{statistics.median(column):>16.1f}{max(column):>8.1f}"
                for column in zip(*rows, strict=True)
            ]
            print(f"{name:<20}{''.join(columns)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mbit", type=float, nargs="+", default=[100, 200])
    parser.add_argument("--frame-bytes", type=int, default=1 << 20)
    parser.add_argument("--probes", type=int, default=15)
    parser.add_argument("--role", choices=["all", "producer", "consumer"], default="all")
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--encrypt", action="store_true")
    parser.add_argument("--throughput", action="store_true", help="only what the link carries")
    args = parser.parse_args()
    identity = SEALED if args.encrypt else IDENTITY
    if args.role == "producer":
        produce(identity, args.frame_bytes, args.mbit[0])
    elif args.role == "consumer":
        if args.throughput:
            found = throughput(identity, args.host, args.port)
        else:
            found = consume(identity, args.host, args.port, args.probes)
        print(json.dumps(found))
    else:
        for mbit in args.mbit:
            measure(mbit, args.frame_bytes, args.probes, args.encrypt, args.throughput)


if __name__ == "__main__":
    main()
