# SPDX-License-Identifier: Apache-2.0
"""What Lynx counts: the catalogue of metrics, and the meter that turns events into them.

Events are the facts, metrics their sums: `EventLog` shows every event to a `Meter`, and
`_COUNTED` says what each adds to. vLLM carries the sums to its front end with every engine step
(`engine/stats.py`). Pure Python; runs without torch and without vLLM.
"""

import enum
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lynx_connector.telemetry.failures import CAUSES, explain, failure_code

PREFIX = "vllm:lynx_"

PRODUCER, CONSUMER = "producer", "consumer"
TIERS = ("anchor", "residual", "exact")
STARTS = ("speculative", "blocking", "local", "recompute")
PATHS = ("one_pass", "rows", "rewind")
OUTCOMES = ("complete", "dropped")


# ---- catalogue --------------------------------------------------------------------------------


class Kind(enum.StrEnum):
    """Prometheus' types."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)

_TIER = {"tier": TIERS}
_BOTH = (PRODUCER, CONSUMER)


@dataclass(frozen=True)
class Metric:
    """One metric. `labels` maps a label to its values; an empty tuple: known at run time only."""

    name: str
    kind: Kind
    help: str
    roles: tuple[str, ...]
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def full_name(self) -> str:
        """As on `/metrics` and in queries; a histogram adds _bucket, _sum and _count to it."""
        return PREFIX + self.name + ("_total" if self.kind is Kind.COUNTER else "")

    def combinations(self, roles: tuple[str, ...], ranks: int) -> Iterator[tuple[str, ...]]:
        """Label values to show from the start on an instance of these roles."""
        known = dict(self.labels)
        if "role" in known:
            known["role"] = tuple(role for role in known["role"] if role in roles)
        if "rank" in known:
            known["rank"] = tuple(map(str, range(ranks)))
        return itertools.product(*known.values())


def _catalogue() -> Iterator[Metric]:
    def counter(name: str, text: str, *roles: str, **labels: tuple[str, ...]) -> Metric:
        return Metric(name, Kind.COUNTER, text, roles, labels)

    def histogram(name: str, text: str, *roles: str, **labels: tuple[str, ...]) -> Metric:
        return Metric(name, Kind.HISTOGRAM, text, roles, labels)

    def gauge(name: str, text: str, *roles: str) -> Metric:
        roles = roles or _BOTH
        return Metric(name, Kind.GAUGE, text, roles, {"role": roles, "rank": ()})

    yield counter("prefills", "Prefills for others that ended.", PRODUCER, outcome=OUTCOMES)
    yield histogram("prefill_seconds", "From a prefill's arrival to its end.", PRODUCER)
    yield histogram("staging_wait_seconds", "Prefills that waited for room in staging.", PRODUCER)
    yield counter("encoded_tokens", "Tokens encoded into tiers.", PRODUCER)
    yield counter(
        "reused_tokens", "Tokens whose tiers were kept from an earlier prefill.", PRODUCER
    )
    yield histogram("encode_seconds", "Encoding one chunk of a prefill.", PRODUCER)
    yield counter("plans", "Prefills by the plan chosen for their KV.", PRODUCER, plan=())
    yield counter("sent_bytes", "KV payload sent.", PRODUCER, **_TIER)
    yield histogram(
        "frame_queue_seconds",
        "Frames that could go and waited for the link.",
        PRODUCER,
        **_TIER,
    )
    yield histogram("frame_send_seconds", "Frames on their way to the link.", PRODUCER, **_TIER)
    yield counter("tables_learned", "Learned tables published.", PRODUCER)
    yield counter("tables_sent_bytes", "Learned tables sent.", PRODUCER)
    yield counter("received_bytes", "KV payload received, wanted or not.", CONSUMER, **_TIER)
    yield histogram(
        "tier_seconds", "From a transfer's start until its whole tier is here.", CONSUMER, **_TIER
    )
    yield histogram(
        "write_seconds", "Writing one frame into the cache: decode or patch.", CONSUMER, **_TIER
    )
    yield counter("requests", "Decode requests by how they start.", CONSUMER, start=STARTS)
    yield counter("refined", "Transfers whose final tier is in the cache.", CONSUMER)
    yield counter("verifications", "Verifications by path.", CONSUMER, path=PATHS)
    yield counter("drafted_tokens", "Drafts that were verified.", CONSUMER)
    yield counter("accepted_tokens", "Drafts that verification confirmed.", CONSUMER)
    yield histogram("drafting_seconds", "From the first draft to verification.", CONSUMER)
    yield histogram("verification_seconds", "From the end of drafting to its result.", CONSUMER)
    yield counter(
        "failures",
        "Transfers that failed, by cause.",
        *_BOTH,
        role=(PRODUCER, CONSUMER),
        cause=CAUSES,
    )
    yield counter(
        "lost_events",
        "Events that events_file could not take.",
        *_BOTH,
        role=(PRODUCER, CONSUMER),
    )
    yield gauge("staging_used_bytes", "Host memory that encoded tiers take.")
    yield gauge("staging_limit_bytes", "Host memory that encoded tiers may take.")
    yield gauge("open_transfers", "Transfers staged (producer) or under way (consumer).")
    yield gauge("connections", "Connections to other instances.")
    yield gauge("reuse_used_bytes", "Host memory of tiers kept for later prefills.", PRODUCER)
    yield gauge("link_mbit", "Measured rate of the link in Mbit/s; 0: not known yet.", PRODUCER)


CATALOGUE: dict[str, Metric] = {metric.name: metric for metric in _catalogue()}


# ---- counting ---------------------------------------------------------------------------------

Values = dict[str, dict[str, Any]]
"""Metric -> label values joined by commas -> sum (counter), last value (gauge), list of
observations (histogram). Under `EXPLAINED`: request id -> why its transfer failed."""

EXPLAINED = "explained"


def merge(into: Values, more: Values) -> None:
    """Add what another rank, or a later step, has counted."""
    for name, by_label in more.items():
        if name == EXPLAINED:
            into[name] = into.get(name, {}) | by_label
            continue
        kind, target = CATALOGUE[name].kind, into.setdefault(name, {})
        for label, value in by_label.items():
            if kind is Kind.GAUGE or label not in target:
                target[label] = list(value) if kind is Kind.HISTOGRAM else value
            else:
                target[label] = target[label] + value


class Meter:
    """What one half or worker has counted since it was asked last. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: Values = {}
        self._gauges: dict[tuple[str, str], float] = {}

    def __call__(
        self, event: str, role: str, fields: Mapping[str, Any], request: str | None = None
    ) -> None:
        """Count one event, and remember why a request failed."""
        if (counted := _COUNTED.get(event)) is not None:
            counted(self, role, fields)
        if request is not None and event in _EXPLAINING:
            self._merge(EXPLAINED, explain(fields["cause"], fields.get("peer") or ""), (request,))

    def add(self, name: str, value: float = 1, *labels: str) -> None:
        """Add to a counter."""
        self._merge(name, value, labels)

    def observe(self, name: str, value: float, *labels: str) -> None:
        """Add an observation to a histogram."""
        self._merge(name, [value], labels)

    def set(self, name: str, value: float, *labels: str) -> None:
        """Set a gauge; reported only when it changes."""
        key = (name, ",".join(labels))
        if self._gauges.get(key) != value:
            self._gauges[key] = value
            self._merge(name, value, labels)

    def _merge(self, name: str, value: Any, labels: tuple[str, ...]) -> None:
        with self._lock:
            merge(self._values, {name: {",".join(labels): value}})

    def take(self) -> Values:
        """All that was counted since the last call."""
        with self._lock:
            values, self._values = self._values, {}
        return values


def _failed(meter: Meter, role: str, fields: Mapping[str, Any]) -> None:
    if (code := failure_code(fields["cause"])) is not None:
        meter.add("failures", 1, role, code)


def _fetch_refused(meter: Meter, role: str, fields: Mapping[str, Any]) -> None:
    # Of a transfer that was refused or dropped, that was counted already.
    if (code := failure_code(fields["cause"])) in ("unknown_transfer", "malformed"):
        meter.add("failures", 1, role, code)


def _prefill_ended(meter: Meter, role: str, fields: Mapping[str, Any]) -> None:
    meter.add("prefills", 1, fields["outcome"])
    if fields["outcome"] == "complete":
        meter.observe("prefill_seconds", fields["seconds"])


def _chunk_encoded(meter: Meter, role: str, fields: Mapping[str, Any]) -> None:
    meter.add("encoded_tokens", fields["tokens"])
    meter.add("reused_tokens", fields["reused"])
    meter.observe("encode_seconds", fields["seconds"])


def _frame_sent(meter: Meter, role: str, fields: Mapping[str, Any]) -> None:
    meter.add("sent_bytes", fields["bytes"], fields["tier"])
    meter.observe("frame_queue_seconds", fields["queue_seconds"], fields["tier"])
    meter.observe("frame_send_seconds", fields["seconds"], fields["tier"])


def _refined(meter: Meter, role: str, fields: Mapping[str, Any]) -> None:
    meter.add("refined")
    for tier, seconds in fields["tier_seconds"].items():
        meter.observe("tier_seconds", seconds, tier)


def _verified(meter: Meter, role: str, fields: Mapping[str, Any]) -> None:
    meter.add("verifications", 1, fields["how"])
    meter.add("drafted_tokens", fields["drafted"])
    meter.add("accepted_tokens", fields["accepted"])
    meter.observe("verification_seconds", fields["ms"] / 1e3)


def _written(meter: Meter, role: str, fields: Mapping[str, Any]) -> None:
    meter.observe("write_seconds", fields["seconds"], fields["tier"])


_COUNTED: dict[str, Callable[[Meter, str, Mapping[str, Any]], None]] = {
    "plan": lambda meter, _, fields: meter.add("plans", 1, fields["plan"]),
    "started": lambda meter, _, fields: meter.observe(
        "staging_wait_seconds", fields["waited_seconds"]
    ),
    "prefill_ended": _prefill_ended,
    "chunk_encoded": _chunk_encoded,
    "frame_sent": _frame_sent,
    "tables_learned": lambda meter, *_: meter.add("tables_learned"),
    "tables_sent": lambda meter, _, fields: meter.add("tables_sent_bytes", fields["bytes"]),
    "refused": _failed,
    "released": _failed,
    "fetch_refused": _fetch_refused,
    "admitted": lambda meter, _, fields: meter.add("requests", 1, fields["start"]),
    "not_loaded": lambda meter, _, fields: meter.add("requests", 1, fields["start"]),
    "frame_received": lambda meter, _, fields: meter.add(
        "received_bytes", fields["bytes"], fields["tier"]
    ),
    "frame": _written,
    "patched": _written,
    "refined": _refined,
    "failed": _failed,
    "verify_started": lambda meter, _, fields: meter.observe(
        "drafting_seconds", fields["drafting_seconds"]
    ),
    "verified": _verified,
}
"""What an event adds to. Of the others nothing is counted."""

_EXPLAINING = ("failed", "refused")
"""Events whose cause the front end tells the client, if the request ends with an error."""
