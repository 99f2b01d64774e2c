# SPDX-License-Identifier: Apache-2.0
"""What the long-running commands show: a bar while they work, tables at the end."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


def report_console(width: int) -> Console:
    """For the report; a file, which has no width of its own, gets `width` columns."""
    console = Console()
    if not console.is_terminal:
        console.width = width
    return console


def progress_bar() -> Progress:
    """Steps done of all, time, and what was done last; on stderr, gone at the end."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(
        *columns, TextColumn("{task.description}"), console=Console(stderr=True), transient=True
    )
