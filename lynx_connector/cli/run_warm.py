# SPDX-License-Identifier: Apache-2.0
"""`lynx warm`: compile a model's CPU kernels ahead, so that its first start does not wait."""

from __future__ import annotations

import time

import torch
import typer
from lynx_kernels.shared.paged import PagedKVCache, PageIndex
from rich.console import Console

from lynx_connector.cli.run_plan import read_config
from lynx_connector.codec import CodecError, KVGeometry
from lynx_connector.codec.cache import CodecCache
from lynx_connector.codec.types import DTYPES
from lynx_connector.plan import PlanError


def run(model: str, dtype: str, revision: str | None = None) -> None:
    """Compile and print how long each part took; exit status 2 with one line for bad input."""
    try:
        if dtype != "auto" and dtype not in DTYPES:
            raise PlanError(f"--dtype {dtype} is not one of auto, {', '.join(DTYPES)}")
        read = read_config(model, revision)
        if dtype == "auto":  # vLLM's own choice is bfloat16 for a float32 model, too
            dtype = read["dtype"] if read["dtype"] in ("bfloat16", "float16") else "bfloat16"
        warm(KVGeometry(1, 1, read["head_dim"], dtype), Console())
    except (PlanError, CodecError) as error:
        typer.secho(f"lynx warm: {error}", fg="red", err=True)
        raise typer.Exit(2) from None


def warm(geometry: KVGeometry, console: Console) -> None:
    """Compile everything that a start with this head size and dtype may need on a CPU."""
    head_dim = geometry.head_dim
    page = torch.zeros(1, 1, 16, 2 * head_dim, dtype=DTYPES[geometry.dtype])
    index = PageIndex.rows(16, head_dim, 2 * head_dim)
    codecs = CodecCache(geometry, PagedKVCache({"warm": page}, 16, 1, head_dim, index))
    began = time.monotonic()
    for name, work in (
        ("bf16", lambda: codecs.get("bf16")),
        ("hadamard", lambda: codecs.get("hadamard")),
        ("int8", lambda: codecs.get("int8")),
        ("int4", lambda: codecs.get("int4")),
        ("klt", codecs.compile_ahead),
        ("exact tier", codecs.compile_exact),
    ):
        start = time.monotonic()
        try:
            work()
            took = f"{time.monotonic() - start:6.1f} s"
        except CodecError as error:
            took = f"not for this model: {error}"
        console.print(f"{name:10} {took}", highlight=False, soft_wrap=True)
    console.print(
        f"Kernels for head size {head_dim} and {geometry.dtype} are compiled "
        f"({time.monotonic() - began:.1f} s). GPU kernels are compiled at a start.",
        highlight=False,
        soft_wrap=True,
    )
