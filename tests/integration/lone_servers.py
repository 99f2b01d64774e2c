# SPDX-License-Identifier: Apache-2.0
"""Servers that a test starts beside the session's pair, each for itself."""

import copy
from pathlib import Path
from typing import Any, Self

from lynx_connector.testbed.cluster import Cluster, Side, free_port
from lynx_connector.testbed.launch import Role
from lynx_connector.testbed.link import loopback

from .pair import DecodeServer, Pair, transfer_flag

PREFILL_CHUNK = 512


class DecodeOnly(DecodeServer):
    """A lone decode server with kv_load_failure_policy 'fail'."""

    def __init__(self, model: Path, folder: Path):
        self.events_path = folder / "events-decode.jsonl"
        lynx = {
            "events_file": str(self.events_path),
            "transfer_timeout_seconds": 20,
            "tables_dir": str(folder / "tables"),
        }
        flag = transfer_flag("kv_consumer", "fail", lynx)
        side = Side(vllm_args=[*flag, "--served-model-name", "m"])
        cluster = Cluster(model, folder, dtype="float32", router=False, decode=side)
        self.server = cluster.decode
        self.url = self.server.url


class PrefillOnly:
    """A lone prefill server with a bootstrap server; `lynx`: its other settings."""

    def __init__(self, model: Path, folder: Path, *, link_mbit: int, **lynx: Any):
        self.bootstrap_port = free_port()
        arguments = ["--max-num-batched-tokens", str(PREFILL_CHUNK), "--served-model-name", "m"]
        side = Side(lynx=lynx | {"bootstrap_port": self.bootstrap_port}, vllm_args=arguments)
        link = loopback(link_mbit)
        cluster = Cluster(model, folder, link=link, dtype="float32", router=False, prefill=side)
        self.server = cluster.prefill
        self.events_path = cluster.events_file(Role.PREFILL)

    def __enter__(self) -> Self:
        self.server.start()
        self.server.wait_ready(300)
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.stop()

    def before(self, pair: Pair, decode: DecodeServer | None = None) -> Pair:
        """`pair` with this prefill server, and with another decode server if one is given."""
        view = copy.copy(pair)
        view.prefill_url, view.prefill_events = self.server.url, self.events_path
        view.bootstrap_port = self.bootstrap_port
        if decode is not None:
            view.url, view.events_path = decode.url, decode.events_path
        return view
