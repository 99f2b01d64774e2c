# SPDX-License-Identifier: Apache-2.0
"""`lynx calibrate`: learn klt's tables from texts and put them where a producer begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.console import Console

from lynx_connector.bench.calibration import calibrate, resolve_dtype
from lynx_connector.bench.errors import BenchError
from lynx_connector.bench.hf_model import HFModel
from lynx_connector.bench.texts import check_texts
from lynx_connector.codec import CodecError
from lynx_connector.codec.table_store import store_tables
from lynx_connector.config import LynxConfig


@dataclass(frozen=True)
class Target:
    """What the tables are for; fields as the options of `lynx calibrate`."""

    model: str
    tables_dir: Path | None
    dtype: str
    tensor_parallel_size: int
    revision: str | None
    model_id: str | None


def run(target: Target, texts: Sequence[Path], tokens: int) -> None:
    """Learn, store and print what it cost; exit status 2 with one line for bad input."""
    console = Console()
    try:
        check_texts(texts)
        dtype = resolve_dtype(target.model, target.dtype, target.revision)
        model = HFModel(target.model, dtype, target.revision)
        with Console(stderr=True).status("") as status:
            shards = calibrate(
                model,
                texts,
                tokens,
                target.tensor_parallel_size,
                model_id=target.model_id,
                step=status.update,
            )
            chosen = {} if target.tables_dir is None else {"tables_dir": target.tables_dir}
            root = LynxConfig.from_extra_config(chosen).tables_root()
            if root is None:
                raise BenchError("this user has no home folder: say where by --tables-dir")
            for rank, shard in enumerate(shards):
                size = target.tensor_parallel_size
                path = store_tables(root, shard.key, rank, size, shard.tables, tokens=shard.tokens)
                console.print(
                    f"rank {rank} of {size}: {shard.tokens} tokens, prefilled in "
                    f"{shard.prefill_seconds:.1f} s, learned in {shard.learn_seconds:.1f} s, "
                    f"{path.stat().st_size:,} bytes, digest {shard.tables.digest}",
                    highlight=False,
                    soft_wrap=True,
                )
                console.print(f"  {path}", highlight=False, soft_wrap=True)
    except (BenchError, CodecError, OSError) as error:
        typer.secho(f"lynx calibrate: {error}", fg="red", err=True)
        raise typer.Exit(2) from None
