# SPDX-License-Identifier: Apache-2.0
"""Frames lost, flipped, cut, repeated and late, inside a server that the soak starts.

`install` is a `vllm.general_plugins` entry point of a distribution that `write_plugin` makes in a
folder of the run, so that vLLM loads it in every process of a server that has the folder in its
PYTHONPATH, and the product knows nothing of it. A settings file says what to do, is read again
whenever it changes, and turns faults off where it is not there.
"""

import asyncio
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import numpy as np

SETTINGS_VARIABLE = "LYNX_SOAK_FAULTS"
FAULTS = ("lost", "flipped", "cut", "repeated", "late")
LATE_SECONDS = (0.05, 2.0)


def write_plugin(folder: Path, adapters: bool = False) -> Path:
    """Make the distribution in `folder`; returns what belongs into PYTHONPATH.

    adapters: mend vLLM's CPU kernels for LoRA, too, for requests beside those with an adapter.
    """
    info = folder / "lynx_soak_faults-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lynx-soak-faults\nVersion: 0\n")
    plugins = f"[vllm.general_plugins]\nlynx_soak_faults = {__name__}:install\n"
    if adapters:
        plugins += "lynx_soak_adapters = tests.scheduler.engine:spare_base_requests\n"
    (info / "entry_points.txt").write_text(plugins)
    return folder


def write_settings(path: Path, one_in: int, faults: tuple[str, ...] = FAULTS) -> None:
    """Make one frame in `one_in` meet one of `faults` from now on; 0: none."""
    unknown = set(faults) - set(FAULTS)
    if unknown:
        raise ValueError(f"no transport fault {', '.join(unknown)}; there are {', '.join(FAULTS)}")
    new = path.with_suffix(".new")
    new.write_text(json.dumps({"one_in": one_in if faults else 0, "faults": faults}))
    new.replace(path)


def install() -> None:
    """Wrap the sending of frames (idempotent). Does nothing without the environment variable.

    Raises:
        AttributeError: frames are no longer sent by `Connection.send`: this module has to follow.
    """
    if not (settings := os.environ.get(SETTINGS_VARIABLE)):
        return
    from lynx_connector.transport.connection import Connection

    whole = Connection.send
    if getattr(whole, "with_faults", False):
        return
    injector = Injector(Path(settings), random.Random(os.getpid()))

    async def send(self: Any, message: Any, payload: np.ndarray | None = None) -> None:
        fault = None if payload is None else injector.choose(message, payload)
        if fault is None or payload is None:
            await whole(self, message, payload)
        elif fault == "flipped":
            await whole(self, message, injector.flip(payload))
        elif fault == "cut":
            await whole(self, message, payload[: payload.nbytes // 2])
        elif fault == "repeated":
            await whole(self, message, payload)
            await whole(self, message, payload)
        elif fault == "late":
            await asyncio.sleep(injector.rng.uniform(*LATE_SECONDS))
            await whole(self, message, payload)

    send.with_faults = True  # type: ignore[attr-defined]
    Connection.send = send  # type: ignore[method-assign]


class Injector:
    """Chooses which frame meets which fault, and notes it beside the settings file."""

    def __init__(self, settings: Path, rng: random.Random):
        self.rng = rng
        self._settings = settings
        self._notes = settings.with_suffix(".jsonl")
        self._changed = 0
        self._one_in = 0
        self._faults: list[str] = []

    def choose(self, message: Any, payload: np.ndarray) -> str | None:
        """The fault for one frame, or None."""
        self._read()
        if not self._one_in or self.rng.randrange(self._one_in):
            return None
        fault = self.rng.choice(self._faults)
        if fault == "cut" and payload.nbytes < 2:
            fault = "flipped"
        note = {
            "t": time.time(),
            "fault": fault,
            "message": type(message).__name__,
            "transfer": getattr(message, "transfer_id", None),
            "tier": getattr(message, "tier", None),
            "first_token": getattr(message, "first_token", None),
        }
        with self._notes.open("a") as notes:
            notes.write(json.dumps(note) + "\n")
        return fault

    def flip(self, payload: np.ndarray) -> np.ndarray:
        """A copy with one bit other."""
        flipped = payload.copy()
        flipped.view(np.uint8).reshape(-1)[self.rng.randrange(payload.nbytes)] ^= np.uint8(
            1 << self.rng.randrange(8)
        )
        return flipped

    def _read(self) -> None:
        try:
            changed = self._settings.stat().st_mtime_ns
        except FileNotFoundError:
            self._one_in = 0
            return
        if changed != self._changed:
            settings = json.loads(self._settings.read_text())
            self._one_in, self._faults = settings["one_in"], settings["faults"]
            self._changed = changed


def noted(settings: Path) -> list[dict[str, Any]]:
    """What all processes with these settings did."""
    notes = settings.with_suffix(".jsonl")
    return [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []
