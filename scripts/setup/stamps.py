# SPDX-License-Identifier: Apache-2.0
"""Runs the steps that a stamp does not show as done.

A step's stamp is a hash of its key, chained with the keys of all steps before it and with the text
of the set-up itself: whoever changes one of them has the steps from there on run again.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from typing import NamedTuple

from .base import VENV, say

#: In the environment, so that both go together.
STAMPS = os.path.join(VENV, "lynx-setup.json")


class Step(NamedTuple):
    """One step; the stamp has the name of its function."""

    title: str
    action: Callable[[str], None]  # takes the machine's kind
    key: str = ""
    #: Whether what the step made is still there, where users remove it.
    is_there: Callable[[], bool] = lambda: True


def run_steps(steps: list[Step], kind: str, path: str = STAMPS) -> None:
    """Run each step whose key, chained with those before it, differs from its stamp."""
    stamps = read_stamps(path)
    key = own_text()
    for number, step in enumerate(steps, 1):
        key = hashlib.sha256((key + step.key).encode()).hexdigest()
        name = step.action.__name__
        if stamps.get(name) == key and step.is_there():
            continue
        label = f"[{number}/{len(steps)}]"
        say(f"{label} {step.title}")
        started = time.monotonic()
        step.action(kind)
        stamps = read_stamps(path)  # a new environment begins without any
        stamps[name] = key
        write_stamps(stamps, path)
        say(f"{label} done in {time.monotonic() - started:.0f} s")


def own_text(folder: str = os.path.dirname(os.path.abspath(__file__))) -> str:
    """The text of all files of the set-up, by name."""
    text = ""
    for name in sorted(os.listdir(folder)):
        if name.endswith(".py"):
            with open(os.path.join(folder, name)) as file:
                text += name + "\n" + file.read()
    return text


def read_stamps(path: str = STAMPS) -> dict[str, str]:
    """The stamps by step; none where the file is missing or broken."""
    try:
        with open(path) as file:
            return json.load(file)
    except (OSError, ValueError):
        return {}


def write_stamps(stamps: dict[str, str], path: str = STAMPS) -> None:
    """Replace the file as a whole."""
    with open(path + ".new", "w") as file:
        json.dump(stamps, file, indent=2)
    os.replace(path + ".new", path)
