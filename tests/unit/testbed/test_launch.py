# SPDX-License-Identifier: Apache-2.0
"""The `vllm serve` commands that `lynx serve` and the demo run."""

import json
from pathlib import Path

import pytest

from lynx_connector.testbed import launch
from lynx_connector.testbed.launch import MIDDLEWARE, Role, kv_transfer_config, serve_command

KV = "--kv-transfer-config"


@pytest.fixture(autouse=True)
def vllm_script(monkeypatch):
    monkeypatch.setattr(launch, "console_script", lambda name: f"/bin/{name}")


def command(role: Role, *arguments: str, cpu: bool = True) -> list[str]:
    return serve_command(role, "model", arguments, cpu=cpu)


def scheduler(*arguments: str, cpu: bool) -> str:
    built = command(Role.DECODE, *arguments, cpu=cpu)
    return built[built.index("--scheduler-cls") + 1].rpartition(".")[2]


def test_prefill_gets_the_connector_and_the_scheduler():
    assert command(Role.PREFILL) == [
        "/bin/vllm",
        "serve",
        "model",
        f"{KV}.kv_connector",
        "LynxConnector",
        f"{KV}.kv_role",
        "kv_producer",
        "--scheduler-cls",
        "lynx_connector.scheduler.LynxScheduler",
        "--middleware",
        MIDDLEWARE,
    ]


def test_decode_gets_the_consumer_role():
    built = command(Role.DECODE)
    assert built[built.index(f"{KV}.kv_role") + 1] == "kv_consumer"


@pytest.mark.parametrize(
    ("arguments", "cpu", "expected"),
    [
        ((), True, "LynxScheduler"),
        ((), False, "LynxAsyncScheduler"),
        (("--no-async-scheduling",), False, "LynxScheduler"),
        (("--no_async_scheduling",), False, "LynxScheduler"),
        (("--distributed-executor-backend", "ray"), False, "LynxScheduler"),
        (("--distributed_executor_backend=ray",), False, "LynxScheduler"),
        (("--distributed-executor-backend", "mp"), False, "LynxAsyncScheduler"),
        (("--async-scheduling",), True, "LynxScheduler"),
    ],
)
def test_the_scheduler_fits_how_vllm_schedules(arguments, cpu, expected):
    assert scheduler(*arguments, cpu=cpu) == expected


def test_the_users_flags_come_last_and_unchanged():
    given = ["--port", "8200", "--dtype=float16", "--kv-transfer-config.engine_id", "x"]
    assert command(Role.DECODE, *given)[-len(given) :] == given


@pytest.mark.parametrize(
    "given",
    [
        ["--scheduler-cls", "my.Scheduler"],
        ["--scheduler_cls=my.Scheduler"],
    ],
)
def test_a_scheduler_of_the_user_wins(given):
    text = " ".join(command(Role.DECODE, *given))
    assert "lynx_connector.scheduler" not in text


@pytest.mark.parametrize("flag", [KV, "--kv_transfer_config"])
def test_a_whole_kv_transfer_config_of_the_user_wins(flag):
    built = command(Role.PREFILL, flag, "{}")
    assert f"{KV}.kv_connector" not in built
    assert built[-2:] == [flag, "{}"]


def test_one_dotted_key_of_the_user_leaves_the_others():
    built = command(Role.DECODE, f"{KV}.kv_role=kv_both")
    assert built.count(f"{KV}.kv_connector") == 1
    assert f"{KV}.kv_role" not in built


def test_keys_of_a_config_file_count_as_given(tmp_path: Path):
    file = tmp_path / "decode.yaml"
    file.write_text("scheduler_cls: my.Scheduler\nkv-transfer-config: {kv_role: kv_consumer}\n")
    built = command(Role.DECODE, "--config", str(file))
    added = ["--middleware", MIDDLEWARE]
    assert built == ["/bin/vllm", "serve", "model", *added, "--config", str(file)]


@pytest.mark.parametrize("form", [MIDDLEWARE, f"[other.Middleware, {MIDDLEWARE}]"])
def test_the_middleware_is_added_once(form, tmp_path: Path):
    file = tmp_path / "decode.yaml"
    file.write_text(f"middleware: {form}\n")
    assert "--middleware" not in command(Role.DECODE, "--config", str(file))
    for given in (["--middleware", MIDDLEWARE], [f"--middleware={MIDDLEWARE}"]):
        built = command(Role.DECODE, *given)
        assert [one for one in built if MIDDLEWARE in one] == given[-1:]
    both = command(Role.DECODE, "--middleware", "other.Middleware")
    assert both.count("--middleware") == 2


def test_asynchronous_scheduling_turned_off_in_a_config_file(tmp_path: Path):
    file = tmp_path / "decode.yaml"
    file.write_text("async-scheduling: false\n")
    assert scheduler("--config", str(file), cpu=False) == "LynxScheduler"


def test_kv_transfer_config_carries_lynx_keys():
    config = json.loads(kv_transfer_config(Role.PREFILL, {"codec": "int8"}))
    assert config == {
        "kv_connector": "LynxConnector",
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {"codec": "int8"},
    }
    assert "kv_connector_extra_config" not in json.loads(kv_transfer_config(Role.DECODE, {}))
