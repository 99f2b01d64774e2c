# SPDX-License-Identifier: Apache-2.0
"""A producer in the test's own process, for what a healthy prefill instance never does."""

import re
import uuid
from pathlib import Path

import numpy as np

from lynx_connector.codec import KVGeometry, get_codec
from lynx_connector.telemetry.events import EventLog
from lynx_connector.tiers.pieces import TierBuffers, plan_pieces
from lynx_connector.tiers.staging import StagedTransfer, StagingStore
from lynx_connector.transport.handshake import Identity
from lynx_connector.transport.loop import TransportLoop
from lynx_connector.transport.server import TierServer
from lynx_connector.wire.messages import PROTOCOL_VERSION

GEOMETRY = KVGeometry(30, 3, 64, "float32")


def compatibility_of(log: Path) -> str:
    """The hash that a prefill server printed at start-up."""
    return re.findall(r"compatibility (model:[0-9a-z:|]+)", log.read_text())[-1]


class RogueProducer:
    """Stages noise under the right identity (or a wrong one) and hands it over."""

    def __init__(
        self, loop: TransportLoop, compat: str, link_mbit: float = 0.0, lease: float = 60.0
    ):
        self._events = EventLog(None, "rogue")
        self.loop = loop
        self.store = StagingStore(1 << 30, lease, self._events)
        identity = Identity(compat, "rogue/0")
        self.server = TierServer(self.store, identity, self._events, 1 << 20, link_mbit)
        self.loop.run(self.server.start(0))
        self._codec = get_codec("hadamard", GEOMETRY)
        self._exact = get_codec("bf16", GEOMETRY)

    def handoff(self, num_tokens: int, **lynx: object) -> dict:
        """Stage `num_tokens` of noise and return what a prefill would have replied."""
        transfer_id = uuid.uuid4().hex
        pieces = plan_pieces(num_tokens, 0, 1, 16, self._codec, self._exact)
        transfer = StagedTransfer(transfer_id, "rogue", num_tokens, TierBuffers(pieces))
        self.store.open(transfer)
        rng = np.random.default_rng(0)
        for piece in pieces:
            for rows in piece.rows.values():
                rows[:] = rng.integers(0, 100, rows.shape, np.uint8)
        self.store.advance(transfer, num_tokens)
        return handoff(transfer_id, num_tokens, self.server.port, **lynx)

    def close(self) -> None:
        self.loop.run(self.server.stop())


def handoff(transfer_id: str, num_tokens: int, port: int, **lynx: object) -> dict:
    """kv_transfer_params of a decode leg."""
    ours = {
        "version": PROTOCOL_VERSION,
        "num_tokens": num_tokens,
        "codec": "hadamard",
        "exact_first": 1,
        "exact_last": 16,
        "ports": [port],
        "anchor_bits": 4,
        "final_tier": "residual",
        "tables": [],
    }
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_engine_id": "rogue",
        "remote_block_ids": [],
        "remote_request_id": transfer_id,
        "remote_host": "127.0.0.1",
        "remote_port": port,
        "tp_size": 1,
        "lynx": ours | lynx,
    }
