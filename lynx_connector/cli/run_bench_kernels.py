# SPDX-License-Identifier: Apache-2.0
"""`lynx bench kernels`: what encoding and decoding cost on this machine, as table and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from lynx_connector.bench.errors import BenchError
from lynx_connector.bench.kernels.ops import check_codecs
from lynx_connector.bench.kernels.runner import measure
from lynx_connector.bench.output import save_json
from lynx_connector.cli.terminal import report_console
from lynx_connector.codec import CODECS, CodecError
from lynx_connector.codec.types import DTYPES

DEFAULT_HEAD_DIMS = (64, 128)
DEFAULT_TOKENS = {"cpu": 512, "cuda": 8192}


def run(
    json_path: Path | None,
    codecs: Sequence[str],
    head_dims: Sequence[int],
    dtypes: Sequence[str],
    tokens: int | None,
) -> None:
    """Measure and show; exit status 2 with one line for bad input."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    console = report_console(150)
    try:
        chosen = list(codecs) or list(CODECS)
        check_codecs(chosen)
        for head_dim in head_dims:
            if head_dim < 8 or head_dim % 8:
                raise BenchError(f"--head-dim {head_dim} is not a multiple of 8")
        for dtype in dtypes:
            if dtype not in DTYPES:
                raise BenchError(f"--dtype {dtype!r} is not one of {', '.join(DTYPES)}")
        if json_path is not None and not json_path.parent.is_dir():
            raise BenchError(f"{json_path}: no such folder")
        with Console(stderr=True).status("") as status:
            report = measure(
                chosen,
                head_dims or DEFAULT_HEAD_DIMS,
                dtypes or ("bfloat16",),
                tokens or DEFAULT_TOKENS[device],
                device,
                status.update,
            )
        if json_path is not None:
            save_json(report, json_path)
    except (BenchError, CodecError, OSError) as error:
        typer.secho(f"lynx bench kernels: {error}", fg="red", err=True)
        raise typer.Exit(2) from None
    console.print(_table(report))
    if json_path is not None:
        console.print(f"written: {json_path}", highlight=False)


def _table(report: dict[str, Any]) -> Table:
    title = f"{report['device']}: a plain copy of the same KV moves {report['copy_gb_s']:.2f} GB/s"
    table = Table(title=title, title_justify="left")
    for column in ("codec", "op", "dtype", "head size", "ns an element", "GB/s of KV", "of copy"):
        table.add_column(column, justify="left" if column in ("codec", "op", "dtype") else "right")
    for row in report["rows"]:
        table.add_row(
            row["codec"],
            row["op"],
            row["dtype"],
            str(row["head_dim"]),
            f"{row['ns_per_element']:.3g}",
            f"{row['gb_s']:.3g}",
            f"{row['copy_ratio']:.1%}",
        )
    return table
