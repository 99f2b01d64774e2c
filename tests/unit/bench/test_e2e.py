# SPDX-License-Identifier: Apache-2.0
"""`lynx bench e2e` without servers: what is measured, in which order, and what becomes of it."""

import dataclasses
import io
import json
import time

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.progress import Progress
from typer.testing import CliRunner

from lynx_connector.bench.e2e import measure, runner
from lynx_connector.bench.e2e.cells import PREFILLS, QUICK, Block, Cell, interleaved, ordered
from lynx_connector.bench.e2e.goals import outcomes
from lynx_connector.bench.e2e.modes import MODES, select_modes, server_specs, split_by_memory
from lynx_connector.bench.e2e.prompts import Prompts
from lynx_connector.bench.e2e.report import goals_table, grouped, result_tables, save_png
from lynx_connector.bench.e2e.rows import (
    OUTPUT_TOKENS,
    from_report,
    make_row,
    summary,
    to_report,
)
from lynx_connector.bench.e2e.servers import Fleet, ServerOptions
from lynx_connector.bench.errors import BenchError
from lynx_connector.cli import app, run_bench_e2e
from lynx_connector.config import LynxConfig
from lynx_connector.testbed.link import loopback
from lynx_connector.testbed.trace import Trace
from tests.unit.bench.e2e_rows import SAMPLE, row

KEYS = [
    "mode",
    "link_mbit",
    "prompt_tokens",
    "prefill",
    "concurrency",
    "repeat",
    "ttft_ms",
    "tt8_ms",
    "tt32_ms",
    "tt64_ms",
    "decode_step_ms",
    "drafted",
    "accepted",
    "wire_bytes",
    "cpu_s",
]


def test_report_has_exactly_the_documented_keys():
    report = json.loads(json.dumps(to_report("a machine", "a model", SAMPLE)))
    assert list(report) == ["machine", "model", "rows"]
    assert all(list(one) == KEYS for one in report["rows"])
    assert from_report(report) == SAMPLE


def test_report_with_other_keys_is_refused():
    report = to_report("a machine", "a model", SAMPLE[:1])
    report["rows"][0]["speed"] = 1
    with pytest.raises(BenchError, match="row 0: keys differ in speed"):
        from_report(report)


def test_times_count_from_zero_and_the_step_ignores_bursts():
    cell = Cell(200.0, 4097, "cached", 1, 0)
    burst = [10.5] * 65  # handed over, drafted and accepted: all at once
    times = burst + [10.5 + 0.04 * n for n in range(1, OUTPUT_TOKENS - 64)]
    times[-2] = times[-1]  # the client was late
    made = make_row("lynx", cell, 10.0, times, (64, 64), 1000, 2.0)
    assert (made.ttft_ms, made.tt32_ms, made.tt64_ms) == (500.0, 500.0, 500.0)
    assert made.decode_step_ms == 40.0
    assert (made.drafted, made.accepted, made.wire_bytes) == (64, 64, 1000)


def test_short_answer_is_an_error():
    with pytest.raises(BenchError, match="mode nixl: 3 of 72 tokens came"):
        make_row("nixl", Cell(0, 1025, "cold", 1, 0), 0.0, [1, 2, 3], (0, 0), 0, 0)


def test_quick_covers_every_goal():
    cells = ordered(QUICK)
    wanted = [
        Cell(100.0, 4097, "cached", 1, 0),
        Cell(200.0, 4097, "cached", 1, 1),
        Cell(0.0, 4097, "cached", 1, 0),
        Cell(200.0, 4097, "cold", 1, 0),
        Cell(200.0, 1025, "cached", 8, 0),
    ]
    assert set(wanted) <= set(cells)
    assert len(cells) == 8, "every cell costs about half a minute of the five"


def test_cold_runs_leave_what_cached_ones_need():
    cells = ordered([Block()])
    assert len(cells) == len(set(cells)) == 5 * 3 * 2 * 2 * 3
    for prompt in {cell.prompt_tokens for cell in cells}:
        for at_once in (1, 8):
            own = [c for c in cells if (c.prompt_tokens, c.concurrency) == (prompt, at_once)]
            kinds = [PREFILLS.index(cell.prefill) for cell in own]
            assert kinds == sorted(kinds)
            assert own[0].link_mbit == 100 and own[4].link_mbit == 0, "unlimited comes last"


@given(st.integers(1, 6), st.integers(1, 9))
def test_modes_are_interleaved(mode_count: int, repeats: int):
    modes = list(MODES.values())[:mode_count]
    cells = ordered([Block([200.0], [4097], ["cached"], [1], repeats)])
    steps = interleaved(cells, modes)
    for number, cell in enumerate(cells):
        round_ = steps[number * mode_count : (number + 1) * mode_count]
        assert {one for one, _ in round_} == {cell}
        assert {mode.name for _, mode in round_} == {mode.name for mode in modes}
    firsts = {steps[n * mode_count][1].name for n in range(repeats)}
    assert len(firsts) == min(repeats, mode_count), "no mode is always the first"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"links": [-1.0]}, "--link-mbit -1: at least 0"),
        ({"prompts": [10]}, "--prompt-tokens 10: at least 256"),
        ({"concurrencies": [0]}, "--concurrency 0: at least 1"),
        ({"repeats": 0}, "--repeats 0: at least 1"),
        ({"prefills": ["warm"]}, "--prefill warm: accepted values are cold, cached"),
    ],
)
def test_bad_choice_is_named(change: dict, message: str):
    with pytest.raises(BenchError, match=message):
        dataclasses.replace(Block(), **change).check()


def test_unknown_mode_is_named():
    with pytest.raises(BenchError, match="--mode lynx-int9: did you mean lynx-int8"):
        select_modes(["lynx-int9"])


def test_modes_are_valid_configurations():
    for mode in filter(lambda mode: mode.is_lynx, MODES.values()):
        LynxConfig.from_extra_config(dict(mode.producer))
        LynxConfig.from_extra_config(dict(mode.consumer))


def test_nixl_keeps_blocks_for_as_long_as_a_slow_link_takes():
    for spec in MODES["nixl"].specs():
        config = json.loads(spec.transfer_config)
        assert config["kv_connector_extra_config"] == {"kv_lease_duration": 600}


@pytest.mark.parametrize("terminal", [True, False])
def test_a_file_gets_a_line_for_each_measurement(terminal):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
    lines: list[str] = []
    step = run_bench_e2e._stepper(Progress(console=console), lines.append)
    rows = [row("nixl", tt32, link_mbit=100.0) for tt32 in (1000.0, 3000.0)]
    told = summary(rows)
    step("2 of 2 servers ready", 0, 2)
    step(told, 1, 2)
    step("1 of 4 servers ready", 1, 2)
    step("second", 2, 2)
    assert lines == ([] if terminal else [f"1/2 {told}", "2/2 second"])
    cell = "nixl, 4097 tokens cached, 100 Mbit/s, 1 at once"
    assert told == f"{cell}: 1st token 100 ms, 32nd 2,000 ms"


def test_equal_servers_are_shared():
    lynx = [mode for mode in MODES.values() if mode.is_lynx]
    specs = server_specs(lynx)
    assert len(specs) == len({spec.transfer_config for spec in specs})
    producers = [spec for spec in specs if spec.role == "prefill"]
    assert len(producers) == len(lynx), "each mode encodes in its own way"
    assert len(server_specs([MODES["single"], MODES["nixl"]])) == 3


@given(st.integers(2, 20))
def test_groups_fit_into_memory(room: int):
    modes = list(MODES.values())
    groups = split_by_memory(modes, 1 << 30, room << 30)
    assert [mode for group in groups for mode in group] == modes
    assert all(len(server_specs(group)) <= room for group in groups)


def test_too_little_memory_is_said():
    with pytest.raises(BenchError, match=r"mode nixl needs about 8\.0 GiB of memory, 5\.0 are"):
        split_by_memory([MODES["nixl"]], 4 << 30, 5 << 30)


def test_goals_from_rows():
    found = {(one.goal, one.where): one for one in outcomes(SAMPLE)}
    here = "4097 tokens, 200 Mbit/s"
    expected = {
        ("first token, in decode steps", f"cached, {here}"): (2.5, False),
        ("token 32, cached, / NIXL", here): (0.38, True),
        ("token 32, cached, / blocking INT8", here): (1900 / 3000, True),
        ("token 32, cold, / single server with the cache", here): (1.2, False),
        ("token 32, 8 at once, worst, / NIXL", f"cached, {here}"): (2700 / 6007, True),
        ("token 32, link unlimited, / NIXL", "4097 tokens, unlimited"): (1700 / 1500, False),
    }
    for key, (value, met) in expected.items():
        assert found[key].value == pytest.approx(value), key
        assert found[key].met is met, key


def test_goals_without_their_reference_are_left_out():
    assert outcomes([row("nixl", 1.0), row("single", 1.0)]) == []
    alone = {one.goal for one in outcomes([row("lynx", 1.0)])}
    assert alone == {"first token, in decode steps"}


def test_tables_and_picture(tmp_path):
    tables = result_tables(SAMPLE)
    assert [table.row_count for table in tables] == [4, 2, 2, 2]
    assert list(grouped(SAMPLE)[4097, 1, "cached", 0.0]) == ["nixl", "lynx"]
    assert goals_table(outcomes(SAMPLE)).row_count == len(outcomes(SAMPLE))
    save_png(SAMPLE, tmp_path / "e2e.png", "a title")
    assert (tmp_path / "e2e.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quick", "--mode", "nixl"], "--quick has its own choice"),
        (["--mode", "nxl"], "--mode nxl: did you mean nixl"),
        (["--link-mbit", "-5"], "--link-mbit -5: at least 0"),
        (["--png", "/no/such/folder/e2e.png"], "/no/such/folder/e2e.png: no such folder"),
    ],
)
def test_bad_input_is_refused_before_anything_starts(tmp_path, arguments, message):
    logs = tmp_path / "logs"
    report = ["--json", str(tmp_path / "e2e.json"), "--logs", str(logs)]
    done = CliRunner().invoke(app, ["bench", "e2e", *report, *arguments])
    assert done.exit_code == 2
    assert message in done.stderr
    assert not logs.exists()


def test_without_nixl_the_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(runner.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BenchError, match=r"pip install 'lynx-connector\[bench\]'"):
        runner.Bench(runner.Options(tmp_path), print, print)


def test_prompts_have_the_length_asked_for(model_folder):
    prompts = Prompts(str(model_folder), 900)
    long, short, other = prompts.get(0, 900), prompts.get(0, 400), prompts.get(1, 900)
    assert [len(long), len(short), len(other)] == [900, 400, 900]
    same = sum(a == b for a, b in zip(long, short, strict=False))
    assert same > 300, "a short prompt is the beginning of a long one"
    assert long != other
    with pytest.raises(BenchError, match="the text at hand gives"):
        prompts.get(prompts.count + 1, 900)


def test_servers_of_other_modes_stand_still(tmp_path):
    modes = [MODES["single"], MODES["nixl"]]
    options = ServerOptions("m", "bfloat16", 1024, 1 << 30, tmp_path)
    with Fleet(modes, loopback(0), options) as fleet:
        servers = {server for mode in modes for server in fleet.of(mode)}
        assert len(servers) == 3
        for server in servers:
            server.command = ["sleep", "60"]
            server.start()
        for mode in (modes[0], modes[1], modes[0]):
            fleet.only(mode)
            for server in servers:
                wait_for_state(server.pid, stopped=server not in fleet.of(mode))
    assert not any(server.running for server in servers)


def wait_for_state(pid: int, stopped: bool, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while (psutil.Process(pid).status() == psutil.STATUS_STOPPED) is not stopped:
        assert time.monotonic() < deadline, psutil.Process(pid).status()
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("mode", "prefill", "events", "zero"),
    [
        ("single", "cold", [], 14.0),
        ("single", "cached", [], 10.0),
        ("nixl", "cold", [], 12.0),
        ("lynx", "cold", [{"event": "handoff", "t": 11.9}], 12.0),
        ("lynx", "cold", [{"event": "handoff", "t": 11.9, "early": False}], 12.0),
        (
            "lynx",
            "cold",
            [{"event": "handoff", "t": 11.9, "early": True}, {"event": "prefilled", "t": 13.0}],
            13.0,
        ),
    ],
)
def test_times_count_from_the_end_of_the_prefill(mode, prefill, events, zero):
    served = measure.Served(sent=10.0, replied=12.0, token_times=[14.0, 15.0], transfer="t")
    trace = Trace("", events) if mode == "lynx" else None
    cell = Cell(200.0, 4097, prefill, 1, 0)
    assert measure.prefill_end(MODES[mode], cell, served, trace) == zero
