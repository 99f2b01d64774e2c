# SPDX-License-Identifier: Apache-2.0
"""The set-up behind `make setup`: what an old Python can say, stamps, machines, messages."""

import ast
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from scripts.setup import base, lock, machine, pip, stamps, steps
from scripts.setup.stamps import Step, run_steps

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "scripts" / "setup").rglob("*.py"))


# ---- what may be there before anything is installed


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_an_old_python_can_read_it(file: Path):
    ast.parse(file.read_text(), feature_version=(3, 7))


@pytest.mark.parametrize("name", ["__init__", "__main__", "base", "machine"])
def test_what_comes_before_the_version_is_known_suits_python_3_6(name: str):
    text = (ROOT / "scripts" / "setup" / f"{name}.py").read_text()
    ast.parse(text, feature_version=(3, 6))
    assert "from __future__ import annotations" not in text
    top = re.findall(r"^from \.(\w*) import (.+)", text, re.M)
    assert {module or names for module, names in top} <= {"base", "machine"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_only_the_standard_library_is_imported(file: Path):
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
    assert found - sys.stdlib_module_names <= {"lynx_connector"}


def test_the_model_is_looked_for_without_any_package_installed():
    code = "from scripts.setup.steps import model_is_there; print(model_is_there())"
    command = [sys.executable, "-S", "-c", code]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() in ("True", "False"), done.stderr


def test_an_old_python_says_what_it_needs(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(base.SetupError, match=r"Python 3\.11 or newer is needed.*make PYTHON="):
        machine.use_newer_python()


def test_a_newer_python_is_used_where_it_runs(monkeypatch, tmp_path):
    script(tmp_path / "python3.13", "exit 127")  # a shim of a version that is not active
    script(tmp_path / "python3.12", "exit 0")
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    started = []
    monkeypatch.setattr(os, "execv", lambda path, arguments: started.append(arguments))
    monkeypatch.setattr(sys, "argv", ["__main__.py", "--word"])
    with pytest.raises(base.SetupError):  # execv, as patched, comes back
        machine.use_newer_python()
    assert started[0] == [str(tmp_path / "python3.12"), "-m", "scripts.setup", "--word"]


# ---- stamps


class Record:
    """Steps that write down that they ran."""

    def __init__(self, path: Path):
        self.path = path / "stamps.json"
        self.ran: list[str] = []

    def step(self, name: str, key: str = "", *, error: Exception | None = None, there=True) -> Step:
        def action(kind: str) -> None:
            assert kind == "cpu"
            self.ran.append(name)
            if error is not None:
                raise error

        action.__name__ = name
        return Step(f"title of {name}", action, key, lambda: there)

    def run(self, *some: Step) -> list[str]:
        """The names of the steps that ran."""
        self.ran.clear()
        run_steps(list(some), "cpu", str(self.path))
        return list(self.ran)


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return Record(tmp_path)


def test_a_second_run_does_and_says_nothing(record, capsys):
    some = [record.step("one"), record.step("two", "key")]
    assert record.run(*some) == ["one", "two"]
    said = capsys.readouterr().out
    assert re.fullmatch(
        r"\[1/2\] title of one\n\[1/2\] done in \d+ s\n"
        r"\[2/2\] title of two\n\[2/2\] done in \d+ s\n",
        said,
    )
    assert record.run(*some) == []
    assert capsys.readouterr().out == ""


def test_another_key_runs_its_step_and_those_behind_it(record):
    record.run(*(record.step(name) for name in ("one", "two", "three")))
    changed = [record.step("one"), record.step("two", "new"), record.step("three")]
    assert record.run(*changed) == ["two", "three"]
    assert record.run(*changed) == []


def test_a_missing_stamp_runs_its_step_alone(record):
    some = [record.step(name) for name in ("one", "two", "three")]
    record.run(*some)
    found = json.loads(record.path.read_text())
    del found["two"]
    record.path.write_text(json.dumps(found))
    assert record.run(*some) == ["two"]


def test_what_is_gone_is_made_again(record):
    record.run(record.step("one"), record.step("model"))
    assert record.run(record.step("one"), record.step("model", there=False)) == ["model"]


def test_a_failed_step_stops_the_run_and_is_run_again(record):
    fails = record.step("two", error=base.SetupError("no network"))
    with pytest.raises(base.SetupError, match="no network"):
        record.run(record.step("one"), fails, record.step("three"))
    assert record.ran == ["one", "two"]
    assert record.run(*(record.step(n) for n in ("one", "two", "three"))) == ["two", "three"]


def test_a_broken_file_counts_as_no_stamps(record):
    record.run(record.step("one"))
    record.path.write_text("{")
    assert record.run(record.step("one")) == ["one"]


def test_a_new_environment_begins_without_stamps(record):
    some = [record.step("venv"), record.step("two")]
    record.run(*some)

    def venv(kind: str) -> None:
        record.path.unlink()  # as make_venv does when it removes .venv

    assert record.run(Step("anew", venv, "another Python"), record.step("two")) == ["two"]
    assert record.run(Step("anew", venv, "another Python"), record.step("two")) == []


def test_stamps_depend_on_every_file_of_the_set_up(tmp_path, record, monkeypatch):
    folder = Path(stamps.__file__).parent
    copies = [tmp_path / file.name for file in folder.glob("*.py")]
    for copy in copies:
        copy.write_text((folder / copy.name).read_text())
    monkeypatch.setattr(stamps, "own_text", lambda own_text=stamps.own_text: own_text(tmp_path))
    record.run(record.step("one"))
    assert len(copies) == len([file for file in FILES if file.parent == folder])
    for copy in copies:
        assert record.run(record.step("one")) == []
        copy.write_text(copy.read_text() + "# changed\n")
        assert record.run(record.step("one")) == ["one"], copy.name


def test_the_steps_have_a_stamp_each_and_follow_what_they_depend_on():
    by_name = {step.action.__name__: step for step in steps.steps_for("cpu")}
    assert list(by_name) == [
        "make_venv",
        "install_vllm",
        "install_project",
        "check_install",
        "make_model",
    ]
    assert by_name["install_project"].key == (ROOT / "pyproject.toml").read_text()
    model = ROOT / "lynx_connector" / "testbed" / "model.py"
    assert by_name["make_model"].key == model.read_text()
    assert by_name["make_model"].is_there is steps.model_is_there
    other = {step.action.__name__: step for step in steps.steps_for("cu13")}
    assert {name for name in by_name if by_name[name].key != other[name].key} == {"install_vllm"}


def test_a_second_set_up_waits_for_the_first(tmp_path, monkeypatch):
    folder = str(tmp_path)
    order: list[str] = []
    said = threading.Event()

    def say(line: str) -> None:
        assert line == "another set-up is at work here: waiting for it"
        said.set()

    def second() -> None:
        with lock.only_one(folder):
            order.append("second")

    monkeypatch.setattr(lock, "say", say)
    thread = threading.Thread(target=second)
    with lock.only_one(folder):
        thread.start()
        assert said.wait(60)
        order.append("first")
    thread.join(60)
    assert order == ["first", "second"]


# ---- kinds of machines


def script(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


LISTED = 'if [ "$1" = -L ]; then echo "GPU 0: NVIDIA H100 (UUID: GPU-1)"; exit 0; fi\n'


@pytest.mark.parametrize(
    ("tool", "kind"),
    [
        (None, "cpu"),
        ("exit 9", "cpu"),  # a driver that does not answer
        ('echo "No devices were found"', "cpu"),
        (LISTED + 'echo "| Driver Version: 550.54  CUDA Version: 12.4 |"', "cu12"),
        (LISTED + 'echo "| Driver Version: 580.82  CUDA Version: 13.0 |"', "cu13"),
    ],
)
def test_kinds_of_machines(monkeypatch, tmp_path, tool: str | None, kind: str):
    if tool is not None:
        script(tmp_path / "nvidia-smi", tool)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.machine_kind() == kind


def test_every_kind_has_a_title_and_a_need_of_disk():
    assert "for CPU" in steps.vllm_title("cpu")
    assert "for CUDA" in steps.vllm_title("cu12") == steps.vllm_title("cu13")
    assert set(steps.DISK_GIB) == {"cpu", "cu12", "cu13"}


# ---- messages


@pytest.mark.parametrize(
    ("output", "remedy"),
    [
        ("OSError: [Errno 28] No space left on device", "free some space"),
        ("NewConnectionError: Connection refused", "check the network"),
        ("Temporary failure in name resolution", "check the network"),
        ("Read timed out.", "check the network"),
        ("ERROR: No matching distribution found for torch==2.11", "no build for this machine"),
        ("error: subprocess-exited-with-error", pip.LOG),
    ],
)
def test_what_pip_said_comes_with_a_remedy(output: str, remedy: str):
    message = pip.explain_pip(f"  {output}\n", f"Collecting torch\n{output}\n")
    assert message.startswith(f"pip failed:\n{output}\n")
    assert remedy in message.splitlines()[-1]


def test_too_little_disk_is_said_before_anything_is_made(monkeypatch, tmp_path):
    monkeypatch.setattr(steps, "PYTHON", str(tmp_path / "none"))
    monkeypatch.setitem(steps.DISK_GIB, "cpu", 10**9)
    with pytest.raises(base.SetupError, match=r"GiB free.*Free some space"):
        steps.make_venv("cpu")
