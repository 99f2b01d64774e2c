# SPDX-License-Identifier: Apache-2.0
"""Counting, aggregation and Prometheus; the documentation and the dashboard name what there is."""

import ast
import json
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from lynx_connector.engine.stats import LynxPromMetrics, LynxStats
from lynx_connector.telemetry.events import EventLog
from lynx_connector.telemetry.failures import CAUSES
from lynx_connector.telemetry.metrics import (
    CATALOGUE,
    CONSUMER,
    PRODUCER,
    TIERS,
    Kind,
    Meter,
    merge,
)

ROOT = Path(__file__).parents[3]
DOCS = (ROOT / "docs/metrics.md").read_text()


def test_counting_needs_neither_torch_nor_vllm():
    code = (
        "import sys, lynx_connector.telemetry.events; "
        "assert not {'torch', 'vllm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- meter -------------------------------------------------------------------------------------


def test_a_meter_gives_what_came_since_the_last_time():
    meter = Meter()
    events = EventLog(None, PRODUCER, meter)
    sent = {"tier": "anchor", "bytes": 10, "queue_seconds": 0.5, "seconds": 0.25}
    events("frame_sent", "r", "t", **sent)
    events("frame_sent", "r", "t", **sent)
    events("released", "r", "t", cause="no consumer within lease_seconds=1")
    events("released", "r", "t", cause="done")
    meter.set("open_transfers", 2, PRODUCER, "0")
    assert meter.take() == {
        "sent_bytes": {"anchor": 20},
        "frame_queue_seconds": {"anchor": [0.5, 0.5]},
        "frame_send_seconds": {"anchor": [0.25, 0.25]},
        "failures": {"producer,lease_expired": 1},
        "open_transfers": {"producer,0": 2},
    }
    meter.set("open_transfers", 2, PRODUCER, "0")
    assert meter.take() == {}
    meter.set("open_transfers", 0, PRODUCER, "0")
    assert meter.take() == {"open_transfers": {"producer,0": 0}}


def test_an_instance_of_both_roles_keeps_them_apart(tmp_path):
    meter = Meter()
    producer = EventLog(tmp_path / "events", PRODUCER, meter, "e")
    consumer = producer.for_consumer()
    producer("refused", "r", "t", cause="staging is full")
    consumer("failed", "r", "t", cause="staging is full", peer="h")
    assert meter.take()["failures"] == {"producer,staging_full": 1, "consumer,staging_full": 1}
    for log in (producer, consumer):
        log.close()
    lines = [json.loads(line) for line in (tmp_path / "events").read_text().splitlines()]
    assert [line["role"] for line in lines] == ["producer", "consumer"]
    assert {line["engine"] for line in lines} == {"e"}


def test_nothing_is_lost_between_threads():
    meter, seen = Meter(), []

    def count():
        for _ in range(2000):
            meter.add("refined")

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        seen.append(meter.take())
    seen.append(meter.take())
    assert sum(values.get("refined", {}).get("", 0) for values in seen) == 8000


# ---- vLLM's way --------------------------------------------------------------------------------


def stats(**values):
    return LynxStats(data=values)


def test_ranks_add_up_and_gauges_keep_their_rank():
    first = stats(
        sent_bytes={"anchor": 1},
        encode_seconds={"": [1.0]},
        open_transfers={"producer,0": 3},
    )
    second = stats(
        sent_bytes={"anchor": 2, "residual": 5},
        encode_seconds={"": [2.0]},
        open_transfers={"producer,1": 4},
    )
    total = first.aggregate(second).aggregate(stats(open_transfers={"producer,0": 0}))
    assert total.data == {
        "sent_bytes": {"anchor": 3, "residual": 5},
        "encode_seconds": {"": [1.0, 2.0]},
        "open_transfers": {"producer,0": 0, "producer,1": 4},
    }
    assert total.reduce() == {"lynx sent_bytes": 8}
    assert second.data["encode_seconds"] == {"": [2.0]}  # not shared with the sum
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(total.to_dict())) == total.data
    total.reset()
    assert total.is_empty()
    assert LynxStats.take(Meter()) is None


def test_vllm_adds_up_the_ranks():
    from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
    from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

    def output(one):
        return ModelRunnerOutput.with_kv_conn_output_only(
            KVConnectorOutput(finished_recving={"r"}, kv_connector_stats=one)
        )

    ranks = [None, stats(sent_bytes={"anchor": 2}), stats(sent_bytes={"anchor": 3})]
    total = KVOutputAggregator(3).aggregate([output(one) for one in ranks])
    assert total.kv_connector_output.kv_connector_stats.to_dict() == {"sent_bytes": {"anchor": 5}}


counts = st.dictionaries(st.sampled_from(TIERS), st.integers(0, 1 << 40))


@given(counts, counts, counts)
def test_adding_is_associative(a, b, c):
    def total(*parts):
        into: dict = {}
        for part in parts:
            merge(into, {"sent_bytes": part} if isinstance(part, dict) else part)
        return into

    left = total(a, b, c)
    right: dict = {}
    merge(right, {"sent_bytes": a})
    merge(right, total(b, c))
    assert left == right


def prom(registry, producer=True, consumer=True, ranks=1):
    config = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(
            is_kv_producer=producer,
            is_kv_consumer=consumer,
            kv_connector_extra_config={"staging_bytes": 1 << 30},
        ),
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks),
    )

    def bound(kind):
        return lambda **options: kind(
            registry=registry,
            **{k: v for k, v in options.items() if k != "multiprocess_mode"},
        )

    types = {kind: bound(kind) for kind in (Counter, Gauge, Histogram)}
    return LynxPromMetrics(config, types, ["model_name", "engine"], {0: ["m", "0"]})


def samples(registry):
    found = {}
    for family in registry.collect():
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
            found[sample.name, tuple(labels.values())] = sample.value
    return found


@pytest.mark.parametrize("roles", [(PRODUCER,), (CONSUMER,), (PRODUCER, CONSUMER)])
def test_all_metrics_of_the_roles_are_at_zero_before_the_first_request(roles):
    registry = CollectorRegistry()
    prom(registry, PRODUCER in roles, CONSUMER in roles, ranks=2)
    found = samples(registry)
    for metric in CATALOGUE.values():
        name = metric.full_name + ("_count" if metric.kind is Kind.HISTOGRAM else "")
        for labels in metric.combinations(roles, 2):
            if not set(metric.roles) & set(roles):
                assert (name, labels) not in found
            elif metric.name == "staging_limit_bytes":
                assert found[name, labels] == 1 << 30
            else:
                assert found[name, labels] == 0
    other = {PRODUCER, CONSUMER} - set(roles)
    assert not any(other & set(labels) for _, labels in found)


def test_what_is_observed_is_shown():
    registry = CollectorRegistry()
    metrics = prom(registry)
    for _ in range(2):
        metrics.observe(
            {
                "sent_bytes": {"anchor": 5},
                "plans": {"klt 4 exact": 1},
                "encode_seconds": {"": [0.5, 0.25]},
                "connections": {"producer,0": 3},
            }
        )
    found = samples(registry)
    assert found["vllm:lynx_sent_bytes_total", ("anchor",)] == 10
    assert found["vllm:lynx_plans_total", ("klt 4 exact",)] == 2
    assert found["vllm:lynx_encode_seconds_sum", ()] == 1.5
    assert found["vllm:lynx_encode_seconds_count", ()] == 4
    assert found["vllm:lynx_connections", ("producer", "0")] == 3


# ---- documentation -----------------------------------------------------------------------------


def rows(heading):
    section = DOCS.split(heading)[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    return {cells[0].strip("`"): cells[1:] for cells in map(split_row, lines)}


def split_row(line):
    return [cell.strip() for cell in line.strip("|").split(" |")]


def test_every_metric_is_documented_and_no_other():
    documented = {name: c for name, c in rows("## Metrics").items() if name.startswith("vllm:")}
    assert set(documented) == {metric.full_name for metric in CATALOGUE.values()}
    for metric in CATALOGUE.values():
        kind, side, labels, *_ = documented[metric.full_name]
        assert kind == metric.kind.value, metric.name
        assert side == ("both" if len(metric.roles) == 2 else metric.roles[0]), metric.name
        for label, values in metric.labels.items():
            assert f"`{label}`" in labels, metric.name
            if label not in ("tier", "role", "cause"):
                assert all(f"`{value}`" in labels for value in values), metric.name


def test_every_cause_is_documented_and_no_other():
    documented = {name for name in rows("Values of `cause`") if not name.startswith("vllm:")}
    assert documented == set(CAUSES)


def emitted():
    """Event -> names of its fields, from the source."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "lynx_connector").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and node.args):
                continue
            function = node.func
            name = getattr(function, "attr", getattr(function, "id", ""))
            if name not in ("events", "_events", "event"):
                continue
            first = node.args[0]
            options = [first.body, first.orelse] if isinstance(first, ast.IfExp) else [first]
            for option in options:
                if isinstance(option, ast.Constant) and isinstance(option.value, str):
                    fields = {word.arg for word in node.keywords if word.arg}
                    found.setdefault(option.value, set()).update(fields)
    return found


def test_every_event_is_documented_and_no_other():
    documented = {
        name: set(re.findall(r"`(\w+)`", cells[1])) for name, cells in rows("## Events").items()
    }
    found = emitted()
    assert set(documented) == set(found)
    for name, fields in found.items():
        assert fields <= documented[name], name
    source = "".join(path.read_text() for path in (ROOT / "lynx_connector").rglob("*.py"))
    for name, fields in documented.items():
        for one in fields - found[name]:  # passed on as a dict
            assert f'"{one}"' in source, (name, one)


def test_only_events_that_exist_are_counted():
    from lynx_connector.telemetry import metrics

    assert set(metrics._COUNTED) <= set(emitted())


def test_the_dashboard_queries_only_what_there_is():
    dashboard = json.loads((ROOT / "configs/grafana-dashboard.json").read_text())
    there = set()
    for metric in CATALOGUE.values():
        ends = ("_bucket", "_sum", "_count") if metric.kind is Kind.HISTOGRAM else ("",)
        there |= {metric.full_name + end for end in ends}
    assert dashboard["templating"]["list"][0]["type"] == "datasource"
    queried = set()
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            continue
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["fieldConfig"]["defaults"]["unit"]
        for target in panel["targets"]:
            names = re.findall(r"vllm:lynx_\w+", target["expr"])
            assert names
            queried.update(names)
            for name in names:
                if name.endswith(("_total", "_sum", "_count", "_bucket")):
                    assert re.search(rf"(rate|increase)\({name}", target["expr"]), target["expr"]
    assert queried <= there
    shown = {next(m for m in there if m == name) for name in queried}
    for metric in CATALOGUE.values():
        assert any(name.startswith(metric.full_name) for name in shown), metric.full_name


def test_prometheus_own_registry_is_left_alone():
    assert not any("lynx" in family.name for family in REGISTRY.collect())
