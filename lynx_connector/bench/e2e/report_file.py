# SPDX-License-Identifier: Apache-2.0
"""The JSON report on disk: written after each measurement, read again to go on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lynx_connector.bench.e2e.rows import Row, from_report, to_report
from lynx_connector.bench.errors import BenchError


@dataclass(frozen=True)
class ReportFile:
    """Rows of one machine and one model."""

    path: Path
    machine: str
    model: str

    def save(self, rows: Sequence[Row]) -> None:
        """Replace the file, so that a run cut short leaves a whole one. Raises OSError."""
        text = json.dumps(to_report(self.machine, self.model, rows), indent=1) + "\n"
        part = self.path.with_name(f"{self.path.name}.part")
        part.write_text(text)
        part.replace(self.path)

    def load(self) -> list[Row]:
        """The rows of an earlier run; none if there is no file yet.

        Raises:
            BenchError: it is no report, or one of another machine or model: ratios between those
                say nothing.
        """
        try:
            report = json.loads(self.path.read_text())
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            raise BenchError(f"{self.path}: {error}") from None
        if not isinstance(report, dict):
            raise BenchError(f"{self.path}: not a report of lynx bench e2e")
        for what in ("machine", "model"):
            here, there = getattr(self, what), report.get(what)
            if here != there:
                raise BenchError(
                    f"{self.path}: its {what} is {there!r}, here it is {here!r}; choose another "
                    "file for --json"
                )
        try:
            return from_report(report)
        except BenchError as error:
            raise BenchError(f"{self.path}: {error}") from None
