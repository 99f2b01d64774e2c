# SPDX-License-Identifier: Apache-2.0
"""A connector test double: coarse KV first, the exact KV some steps later, all in one process.

A request with `kv_transfer_params` {"save": KEY} stores its prompt's KV under KEY; one with
{"load": KEY, ...} gets it back: after `anchor_delay` steps rounded to `bits` bits, after
`residual_delay` steps exactly, or with `fail` instead a failed residual. Steps count from the
allocation of the load. `fail_early` reports the failure before the anchor lands, `lose_anchor` has
the anchor itself fail. `first` is the token that the prefill has sampled: known at once, or after
`first_delay` steps. With {"reply": "early"} it is answered early; with "unwanted" it is given up in
the same step, with "refused" it is to end with an error.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
)


@dataclass
class Load:
    request_id: str
    key: str
    first_block: int
    block_ids: list[int]
    anchor_delay: int
    residual_delay: int
    bits: int
    fail: bool
    fail_early: bool
    lose_anchor: bool
    first: int | None = None
    first_delay: int = 0
    age: int = 0
    anchored: bool = False


@dataclass
class Orders(KVConnectorMetadata):
    saves: list[tuple[str, str, list[int]]] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    cancels: list[str] = field(default_factory=list)


@dataclass
class Report(KVConnectorWorkerMetadata):
    refined: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    first: list[tuple[str, int]] = field(default_factory=list)

    def aggregate(self, other: Report) -> Report:
        return Report(
            self.refined + other.refined, self.failed + other.failed, self.first + other.first
        )


class FakePort:
    """Implements lynx_connector.scheduler.port.SpeculationPort."""

    draft_limit = 64
    verify_rows = 8

    def __init__(self, connector: FakeTransferConnector) -> None:
        self._connector = connector
        self.started: list[str] = []
        self.refined: list[str] = []
        self.failed: list[tuple[str, str]] = []
        self.first: list[tuple[str, int]] = []
        self.events: list[dict[str, Any]] = []
        self.blocking = False

    def start_blocking(self) -> None:
        self.blocking = True

    def draft_limit_of(self, request_id: str) -> int:
        return self.draft_limit

    def take_started(self) -> list[str]:
        taken, self.started = self.started, []
        return taken

    def take_first_tokens(self) -> list[tuple[str, int]]:
        taken, self.first = self.first, []
        return taken

    def take_refined(self) -> list[str]:
        taken, self.refined = self.refined, []
        return taken

    def take_failed(self) -> list[tuple[str, str]]:
        taken, self.failed = self.failed, []
        return taken

    def cancel(self, request_id: str) -> None:
        self._connector.cancels.append(request_id)

    def event(self, name: str, request_id: str, **fields: object) -> None:
        self.events.append({"event": name, "request": request_id, **fields})


class FakeReplies:
    """Implements lynx_connector.scheduler.port.EarlyReplyPort."""

    def __init__(self) -> None:
        self.waiting: dict[str, str] = {}
        self.unwanted: list[str] = []
        self.refused: list[str] = []
        self.ended: dict[str, str] = {}
        self.chunks: list[tuple[int, int]] = []  # (left, most) as the scheduler asked
        self.chunk = 0  # tokens to compute next; 0: as many as possible

    def add(self, request_id: str, how: str | None) -> None:
        if how == "refused":
            self.refused.append(request_id)
        elif how is not None:
            self.waiting[request_id] = how

    def take_answerable(self, scheduled: Any) -> list[str]:
        return [request_id for request_id in scheduled if request_id in self.waiting]

    def reply_early(self, request: Any) -> dict[str, Any]:
        if self.waiting.pop(request.request_id) == "unwanted":
            self.unwanted.append(request.request_id)
        return {"do_remote_prefill": True}

    def next_chunk(self, request_id: str, left: int, most: int) -> int:
        self.chunks.append((left, most))
        return self.chunk or most

    def take_unwanted(self) -> list[str]:
        taken, self.unwanted = self.unwanted, []
        return taken

    def take_refused(self) -> list[str]:
        taken, self.refused = self.refused, []
        return taken


class FakeTransferConnector(KVConnectorBase_V1):
    stored: ClassVar[dict[str, dict[str, torch.Tensor]]] = {}

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._block_size = vllm_config.cache_config.block_size
        self.speculation = FakePort(self) if role == KVConnectorRole.SCHEDULER else None
        self.early_replies = FakeReplies() if role == KVConnectorRole.SCHEDULER else None
        self._params: dict[str, dict[str, Any]] = {}
        self._orders = Orders()
        self._caches: dict[str, torch.Tensor] = {}
        self._loads: dict[str, Load] = {}
        self._report = Report()
        self._received: set[str] = set()
        self._lost: set[str] = set()
        self._sent: set[str] = set()

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    # ---- scheduler side

    @property
    def cancels(self) -> list[str]:
        return self._orders.cancels

    def on_new_request(self, request: Any) -> None:
        params = dict(request.kv_transfer_params or {})
        self._params[request.request_id] = params
        self.early_replies.add(request.request_id, params.get("reply"))

    def get_num_new_matched_tokens(self, request: Any, computed: int) -> tuple[int, bool]:
        missing = request.num_prompt_tokens - computed
        params = self._params[request.request_id]
        if "load" not in params or params.get("taken") or missing <= 0:
            return 0, False
        return missing, True

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        params = self._params[request.request_id]
        if not num_external_tokens or "load" not in params:
            return
        params["taken"] = True
        first = (request.num_prompt_tokens - num_external_tokens) // self._block_size
        last = -(-request.num_prompt_tokens // self._block_size)
        only_exact = self.speculation.blocking
        self._orders.loads.append(
            Load(
                request.request_id,
                params["load"],
                first,
                blocks.get_block_ids()[0][first:last],
                params.get("residual_delay", 20) if only_exact else params.get("anchor_delay", 2),
                params.get("residual_delay", 20),
                32 if only_exact else params.get("bits", 4),
                params.get("fail", False),
                params.get("fail_early", False),
                params.get("lose_anchor", False),
                params.get("first"),
                params.get("first_delay", 0),
            )
        )
        if not params.get("blocking") and not only_exact:
            self.speculation.started.append(request.request_id)
        if "first" in params and not params.get("first_delay"):
            self.speculation.first.append((request.request_id, params["first"]))

    def build_connector_meta(self, scheduler_output: Any) -> Orders:
        orders, self._orders = self._orders, Orders()
        return orders

    def update_connector_output(self, connector_output: Any) -> None:
        report = connector_output.kv_connector_worker_meta
        if report is not None:
            self.speculation.first += report.first
            self.speculation.refined += report.refined
            self.speculation.failed += [(rid, "link lost") for rid in report.failed]

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, None]:
        params = self._params.pop(request.request_id)
        self.early_replies.ended[request.request_id] = request.status.name
        if "save" in params:
            used = -(-request.num_prompt_tokens // self._block_size)
            self._orders.saves.append((request.request_id, params["save"], block_ids[:used]))
            return True, None
        if "load" in params:
            self._orders.cancels.append(request.request_id)
        return False, None

    # ---- worker side

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._caches = kv_caches

    def handle_preemptions(self, kv_connector_metadata: Orders) -> None:
        for request_id in kv_connector_metadata.cancels:
            load = self._loads.pop(request_id, None)
            if load is not None and not load.anchored:
                self._received.add(request_id)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        orders = self._get_connector_metadata()
        for request_id, key, block_ids in orders.saves:
            self.stored[key] = {n: t[block_ids].clone() for n, t in self._caches.items()}
            self._sent.add(request_id)
        for load in orders.loads:
            self._loads[load.request_id] = load
        for load in list(self._loads.values()):
            self._step(load)

    def _step(self, load: Load) -> None:
        load.age += 1
        if load.first_delay == load.age:
            self._report.first.append((load.request_id, load.first))
        if load.fail_early and load.age == 1:
            self._report.failed.append(load.request_id)
        if load.lose_anchor and load.age >= load.anchor_delay:
            del self._loads[load.request_id]
            self._lost.add(load.request_id)
            self._received.add(load.request_id)
            return
        if not load.anchored and load.age >= load.anchor_delay:
            self._write(load, load.bits)
            load.anchored = True
            self._received.add(load.request_id)
        if load.anchored and load.age >= load.residual_delay:
            del self._loads[load.request_id]
            if load.fail:
                self._report.failed.append(load.request_id)
            else:
                self._write(load, None)
                self._report.refined.append(load.request_id)

    def _write(self, load: Load, bits: int | None) -> None:
        part = slice(load.first_block, load.first_block + len(load.block_ids))
        for name, cache in self._caches.items():
            exact = self.stored[load.key][name][part]
            cache[load.block_ids] = exact if bits is None else _rounded(exact, bits)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        results = KVConnectorTransferResults(
            finished_sending=self._sent,
            finished_recving=self._received,
            failed_recving=self._lost,
        )
        self._sent, self._received, self._lost = set(), set(), set()
        return results

    def build_connector_worker_meta(self) -> Report | None:
        report, self._report = self._report, Report()
        return report if report.refined or report.failed or report.first else None

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **_: Any) -> None:
        pass

    def wait_for_save(self) -> None:
        pass


def _rounded(pages: torch.Tensor, bits: int) -> torch.Tensor:
    """Round to a grid per (block, head) page; says nothing about where K and V lie in a page."""
    steps = 2 ** (bits - 1) - 1
    scale = pages.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(1e-8) / steps
    return (pages / scale).round() * scale
