# SPDX-License-Identifier: Apache-2.0
"""`lynx plan`: what to expect of a model on a link, before anything is installed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from lynx_connector.cli import plan_output
from lynx_connector.plan import FirstToken, KVShape, Mode, PlanError, Setting, paper, predict
from lynx_connector.plan.crossings import crossings
from lynx_connector.plan.errors import require_positive
from lynx_connector.plan.modes import ACCEPTED_OF_24, DEVICES, mode_of
from lynx_connector.plan.shape import ELEMENT_BITS

LOWEST_MBIT, HIGHEST_MBIT = 1.0, 1e6
"""Link rates among which crossing points are looked for."""


@dataclass(frozen=True)
class ModelOptions:
    """The model as the command line names it: a name or all three dimensions."""

    model: str | None
    layers: int | None
    kv_heads: int | None
    head_dim: int | None
    dtype: str
    tensor_parallel_size: int

    def shape(self) -> KVShape:
        """One worker's cache. Raises PlanError, naming what is missing or impossible."""
        given = {
            "layers": self.layers,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
        }
        if self.model is not None:
            read = read_config(self.model)
        else:
            missing = [f"--{name.replace('_', '-')}" for name, value in given.items() if not value]
            zero = {name: value for name, value in given.items() if value is not None}
            require_positive(**zero)
            if missing:
                raise PlanError(f"give a model, or also {', '.join(missing)}")
            read = {"dtype": "bfloat16"}
        read |= {name: value for name, value in given.items() if value is not None}
        if self.dtype != "auto":
            read["dtype"] = self.dtype
        return KVShape(**read).shard(self.tensor_parallel_size)


@dataclass(frozen=True)
class Conditions:
    """What the command line says of the two instances and the link."""

    tokens: Sequence[int]
    link_mbit: Sequence[float]
    step_ms: float
    prefill_tokens_s: float | None
    chunk_tokens: int
    token: int
    codec: str
    anchor_bits: int
    final_tier: str
    device: str

    def check(self) -> None:
        """Raise PlanError for a choice that there is not, or a number that cannot be."""
        for name, value, accepted in (
            ("codec", self.codec, ("klt", "hadamard")),
            ("final_tier", self.final_tier, ("residual", "exact")),
            ("device", self.device, tuple(DEVICES)),
        ):
            if value not in accepted:
                raise PlanError(f"{name} = {value!r}: accepted values are {', '.join(accepted)}")
        if (self.codec, self.anchor_bits) not in ACCEPTED_OF_24:
            raise PlanError(f"anchor_bits = {self.anchor_bits}: klt has 3, 4 and 5, hadamard has 4")
        require_positive(token=self.token)

    def setting(self, shape: KVShape, tokens: int, link_mbit: float) -> Setting:
        """One cell of the table."""
        device = DEVICES[self.device]
        return Setting(
            shape,
            tokens,
            link_mbit,
            self.step_ms,
            self.prefill_tokens_s,
            chunk_tokens=self.chunk_tokens,
            codec_gb_s=device.codec_gb_s,
            verify_cost=device.verify_cost,
        )

    def modes(self, shape: KVShape) -> list[Mode]:
        """bf16, int8 and int4 as one blocking transfer, then Lynx with more and more of itself."""
        lynx: dict[str, dict[str, Any]] = {
            "lynx blocking": {"drafts": False},
            "lynx": {},
            "lynx + first token": {"first_token": FirstToken.HANDOVER},
            "lynx + streaming": {"first_token": FirstToken.HANDOVER, "streamed": True},
        }
        found = [mode_of(name, shape) for name in ("bf16", "int8", "int4")]
        for name, extra in lynx.items():
            mode = mode_of(
                self.codec,
                shape,
                anchor_bits=self.anchor_bits,
                exact=self.final_tier == "exact",
                **extra,
            )
            found.append(plan_output.renamed(mode, name))
        return found


def read_config(model: str, revision: str | None = None) -> dict[str, Any]:
    """Arguments of KVShape from a model's config.json.

    Raises:
        PlanError: it cannot be read, has no attention as we know it, or its heads do not divide.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model, revision=revision).get_text_config()
    except (OSError, ValueError) as error:
        raise PlanError(f"model = {model!r}: {str(error).splitlines()[0]}") from None
    try:
        heads, layers = config.num_attention_heads, config.num_hidden_layers
        hidden = config.hidden_size
    except AttributeError as error:
        raise PlanError(f"model = {model!r}: its config.json lacks a size: {error}") from None
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    require_positive(num_attention_heads=heads, num_key_value_heads=kv_heads)
    if heads % kv_heads:
        raise PlanError(
            f"num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}"
        )
    head_dim = getattr(config, "head_dim", None)
    if not head_dim:
        if hidden % heads:
            raise PlanError(
                f"hidden_size = {hidden} is not a multiple of num_attention_heads = {heads}"
            )
        head_dim = hidden // heads
    dtype = str(getattr(config, "dtype", None) or "bfloat16").rsplit(".", 1)[-1]
    return {
        "layers": layers,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "dtype": dtype if dtype in ELEMENT_BITS else "bfloat16",
    }


def make_report(name: str, shape: KVShape, conditions: Conditions) -> dict[str, Any]:
    """All predictions and crossing points, as they are written to JSON.

    Raises:
        PlanError: an impossible number, by name.
    """
    conditions.check()
    modes = conditions.modes(shape)
    rows, ranges = [], []
    for tokens in conditions.tokens:
        for link_mbit in conditions.link_mbit:
            setting = conditions.setting(shape, tokens, link_mbit)
            rows += [plan_output.row(setting, mode, conditions.token) for mode in modes]
        base = [mode for mode in modes if mode.name in ("bf16", "int8", "int4", "lynx")]
        eight = [mode for mode in base if mode.name != "int4"]
        for kept, among in (("any", base), ("8 bits or more", eight)):
            stretches = crossings(setting, among, conditions.token, LOWEST_MBIT, HIGHEST_MBIT)
            ranges.append(
                {
                    "tokens": tokens,
                    "cache_kept": kept,
                    "best": [{"from_mbit": s.from_mbit, "mode": s.mode} for s in stretches],
                }
            )
    return {
        "model": name,
        "kv_bytes_per_token": shape.bytes_per_token,
        "token": conditions.token,
        "step_ms": conditions.step_ms,
        "rows": rows,
        "crossings": ranges,
    }


def run(
    model: ModelOptions, conditions: Conditions, png: Path | None, json_path: Path | None
) -> None:
    """Predict and show; exit status 2 with one line for bad input."""
    try:
        shape = model.shape()
        name = model.model or f"{shape.layers} layers, {shape.kv_heads} KV heads"
        report = make_report(name, shape, conditions)
        if json_path is not None:
            json_path.write_text(json.dumps(report, indent=2) + "\n")
        if png is not None:
            settings = [conditions.setting(shape, n, LOWEST_MBIT) for n in conditions.tokens]
            plan_output.save_png(report, settings, conditions.modes(shape), png)
    except (PlanError, OSError) as error:
        _refuse(error)
    console = Console()
    console.print(plan_output.prediction_table(report))
    for line in plan_output.notes(report):
        console.print(line, highlight=False, soft_wrap=True)
    _say_written(console, png, json_path)


def run_paper(png: Path | None, json_path: Path | None) -> None:
    """The paper's table beside its prediction."""
    setting = paper.fit()
    report = plan_output.paper_report(setting)
    try:
        if json_path is not None:
            json_path.write_text(json.dumps(report, indent=2) + "\n")
        if png is not None:
            modes = list(paper.modes().values())
            rows = {"model": report["model"], "token": paper.TOKEN}
            plan_output.save_png(rows, [setting], modes, png)
    except OSError as error:
        _refuse(error)
    console = Console()
    console.print(plan_output.paper_table(report))
    drafted = predict(setting, paper.modes()["Lynx"]).drafted
    for line in (
        f"fitted to the INT8 and BF16 rows: link {setting.link_mbit:,.0f} Mbit/s, decode step "
        f"{setting.step_ms:.1f} ms, overhead {setting.overhead_ms:.0f} ms",
        f"assumed: {paper.METADATA_BITS:g} bit of metadata an element in the anchor, "
        f"{paper.ACCEPTED} of {paper.DRAFTED} drafts accepted, verification in one step",
        f"drafts predicted: {drafted:.1f} (paper: {paper.DRAFTED})",
    ):
        console.print(line, highlight=False, soft_wrap=True)
    _say_written(console, png, json_path)


def _say_written(console: Console, *files: Path | None) -> None:
    if any(files):
        console.print(f"written: {', '.join(str(f) for f in files if f)}", highlight=False)


def _refuse(error: Exception) -> None:
    typer.secho(f"lynx plan: {error}", fg="red", err=True)
    raise typer.Exit(2) from None
