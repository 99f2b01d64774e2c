# SPDX-License-Identifier: Apache-2.0
"""`lynx bench codec`: every codec on real KV tensors, as table, picture and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer

from lynx_connector.bench.errors import BenchError
from lynx_connector.bench.hf_model import HFModel, check_folder
from lynx_connector.bench.learning import check_enough_texts
from lynx_connector.bench.output import notes, result_table, save_json, save_png
from lynx_connector.bench.rows import select_rows
from lynx_connector.bench.runner import check_prompts, count_steps, measure
from lynx_connector.bench.texts import check_starts, check_texts
from lynx_connector.cli.terminal import progress_bar, report_console
from lynx_connector.codec import CodecError


def run(
    model: Path,
    texts: Sequence[Path],
    json_path: Path,
    png: Path | None,
    starts: int,
    codecs: Sequence[str],
    prompt_tokens: int,
    dtype: str,
) -> None:
    """Measure and show; exit status 2 with one line for bad input."""
    console = report_console(150)
    try:
        rows = select_rows(codecs)
        learned = any(row.tables for row in rows)
        check_folder(model)
        check_starts(starts)
        check_texts(texts)
        if learned:
            check_enough_texts(texts)
        for file in filter(None, (json_path, png)):
            if not file.parent.is_dir():
                raise BenchError(f"{file}: no such folder")
        loaded = HFModel(model, dtype)
        check_prompts(loaded, texts, starts, prompt_tokens)
        with progress_bar() as bar:
            task = bar.add_task("", total=count_steps(texts, rows))
            report = measure(
                loaded,
                texts,
                rows,
                starts,
                prompt_tokens,
                lambda what: bar.update(task, advance=1, description=what),
            )
        save_json(report, json_path)
        if png is not None:
            save_png(report, png)
    except (BenchError, CodecError, OSError) as error:
        typer.secho(f"lynx bench codec: {error}", fg="red", err=True)
        raise typer.Exit(2) from None
    console.print(result_table(report))
    for line in notes(report, learned):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"written: {', '.join(str(f) for f in (json_path, png) if f)}", highlight=False)
