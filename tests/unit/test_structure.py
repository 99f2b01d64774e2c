# SPDX-License-Identifier: Apache-2.0
"""The architecture holds by itself: directions between rooms, and what is packaged."""

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOOSE = {"__init__", "config", "connector", "errors", "middleware", "plugin"}


def test_import_contracts_are_kept():
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-logo", "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_module_stands_outside_a_room():
    assert {path.stem for path in (ROOT / "lynx_connector").glob("*.py")} == LOOSE
    assert {path.stem for path in (ROOT / "kernels").glob("*.py")} == {"__init__"}


def test_every_package_is_named_for_the_wheel():
    folders = PROJECT["tool"]["setuptools"]["package-dir"]
    found = {
        ".".join((name, *path.parent.relative_to(ROOT / folder).parts))
        for name, folder in folders.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found
