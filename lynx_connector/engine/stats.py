# SPDX-License-Identifier: Apache-2.0
"""Lynx's metrics on their way through vLLM: engine step -> front end -> `/metrics`.

Workers and scheduler half are asked in every engine step (v1/core/sched/scheduler.py:2337); their
answers are added up there, and the front end of each engine hands the sums to Prometheus.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lynx_connector.config import LynxConfig
from lynx_connector.engine.answers import ANSWERS
from lynx_connector.engine.compat import KVConnectorPromMetrics, KVConnectorStats
from lynx_connector.telemetry.metrics import (
    CATALOGUE,
    CONSUMER,
    EXPLAINED,
    PREFIX,
    PRODUCER,
    SECONDS,
    Kind,
    Meter,
    Metric,
    Values,
    merge,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class LynxStats(KVConnectorStats):
    """What was counted in one step; `data` is `metrics.Values`, which vLLM can serialize."""

    @classmethod
    def take(cls, meter: Meter) -> "LynxStats | None":
        """What the meter has counted since the last call; None if nothing."""
        values = meter.take()
        return cls(data=values) if values else None

    def reset(self) -> None:
        """Forget everything."""
        self.data: Values = {}

    def aggregate(self, other: KVConnectorStats) -> "LynxStats":
        """Add another rank's, or a later step's."""
        merge(self.data, other.data)
        return self

    def is_empty(self) -> bool:
        """Whether nothing was counted."""
        return not self.data

    def reduce(self) -> dict[str, int | float]:
        """Counters for vLLM's periodic log line, where they are not zero, over all labels."""
        sums = {
            name: sum(by_label.values())
            for name, by_label in self.data.items()
            if name != EXPLAINED and CATALOGUE[name].kind is Kind.COUNTER
        }
        return {f"lynx {name}": total for name, total in sums.items() if total}


class LynxPromMetrics(KVConnectorPromMetrics):
    """Registers the metrics of this instance's roles, at 0, and keeps them up to date."""

    def __init__(
        self,
        vllm_config: "VllmConfig",
        metric_types: dict[type, type],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ):
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        transfer = vllm_config.kv_transfer_config
        roles = tuple(
            role
            for role, here in (
                (PRODUCER, transfer.is_kv_producer),
                (CONSUMER, transfer.is_kv_consumer),
            )
            if here
        )
        ranks = vllm_config.parallel_config.tensor_parallel_size
        limit = LynxConfig.from_extra_config(transfer.kv_connector_extra_config).staging_bytes
        self._parents: dict[str, Any] = {}
        self._children: dict[tuple[int, str, str], Any] = {}
        for metric in CATALOGUE.values():
            if not set(metric.roles) & set(roles):
                continue
            self._parents[metric.name] = self._register(metric)
            for engine in per_engine_labelvalues:
                for labels in metric.combinations(roles, ranks):
                    child = self._child(engine, metric.name, ",".join(labels))
                    if metric.name == "staging_limit_bytes":
                        child.set(int(limit))

        ANSWERS.count_refused = self._count_refused

    def _count_refused(self, role: str, code: str) -> None:
        """The front end has refused a request, which no engine hears of."""
        for engine in list(self.per_engine_labelvalues)[:1]:
            self._child(engine, "failures", f"{role},{code}").inc()

    def _register(self, metric: Metric) -> Any:
        make: dict[Kind, Callable[..., Any]] = {
            Kind.COUNTER: self._counter_cls,
            Kind.GAUGE: self._gauge_cls,
            Kind.HISTOGRAM: self._histogram_cls,
        }
        more: dict[str, Any] = {}
        if metric.kind is Kind.HISTOGRAM:
            more["buckets"] = SECONDS
        elif metric.kind is Kind.GAUGE:
            more["multiprocess_mode"] = "mostrecent"
        return make[metric.kind](
            name=PREFIX + metric.name,
            documentation=metric.help,
            labelnames=[*self._labelnames, *metric.labels],
            **more,
        )

    def _child(self, engine: int, name: str, labels: str) -> Any:
        key = (engine, name, labels)
        if key not in self._children:
            values = labels.split(",") if CATALOGUE[name].labels else []
            own = self.per_engine_labelvalues[engine]
            self._children[key] = self._parents[name].labels(*own, *values)
        return self._children[key]

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Take over what one engine step has counted."""
        for name, by_label in transfer_stats_data.items():
            if name == EXPLAINED:
                for request_id, text in by_label.items():
                    ANSWERS.explain(request_id, text)
                continue
            kind = CATALOGUE[name].kind
            for labels, value in by_label.items():
                child = self._child(engine_idx, name, labels)
                if kind is Kind.COUNTER:
                    child.inc(value)
                elif kind is Kind.GAUGE:
                    child.set(value)
                else:
                    for one in value:
                        child.observe(one)
