# SPDX-License-Identifier: Apache-2.0
"""The command `lynx`. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lynx_connector.launch import Role

app = typer.Typer(
    name="lynx",
    help="Speculative start for disaggregated vLLM: servers, demo and checks.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
)

bench_app = typer.Typer(
    help="Measure codecs on real KV tensors, and kernels on this machine.", no_args_is_help=True
)
app.add_typer(bench_app, name="bench")

# An option takes one value; what follows it (`--text a.md b.md`, a shell's *.md) lands here.
_MoreTexts = Annotated[list[Path] | None, typer.Argument(hidden=True)]
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command()
def demo(
    link_mbit: Annotated[
        float, typer.Option(min=0, help="Rate of the link in Mbit/s; 0 for no limit.")
    ] = 200,
    out: Annotated[
        Path,
        typer.Option(help="Folder for demo-report.json, demo-timeline.png and demo-logs/."),
    ] = Path("."),
    model: Annotated[
        str | None, typer.Option(help="Model folder or hub name; default: a small one, fetched.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="vLLM's dtype; only float32 is sure to give equal tokens.")
    ] = "float32",
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 3400,
    output_tokens: Annotated[int, typer.Option(min=1)] = 64,
    namespaces: Annotated[
        bool, typer.Option(help="Put the servers into network namespaces where allowed (root).")
    ] = True,
) -> None:
    """Two vLLM servers and a router here: one long prompt, speculative start against blocking."""
    from lynx_connector.cli.run_demo import run

    run(link_mbit, out, model, dtype, prompt_tokens, output_tokens, namespaces)


@app.command(context_settings=_PASS_ON)
def serve(
    context: typer.Context,
    role: Annotated[Role, typer.Argument(help="What this instance does.")],
    model: Annotated[str, typer.Argument(help="Model folder or hub name.")],
) -> None:
    """Run `vllm serve MODEL` with the flags that the role needs. Any flag of vLLM may follow."""
    from lynx_connector.cli.run_serve import run

    run(role, model, context.args)


@app.command()
def doctor(
    peer: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Also check that this prefill's Lynx port answers."),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="JSON instead of lines.")] = False,
) -> None:
    """Check this machine: versions, UCX, memory, ports, and a peer. Exit status 1 if one fails."""
    from lynx_connector.cli.run_doctor import run

    run(peer, json_output)


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(help="Model folder or hub name, as vLLM is given it.")],
    text: Annotated[list[Path], typer.Option(help="Text files to learn from.", metavar="FILE...")],
    more_texts: _MoreTexts = None,
    tables_dir: Annotated[
        Path | None, typer.Option(help="Where a producer looks; default: its own default.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=512, help="Tokens to learn from, at most.")] = 8192,
    dtype: Annotated[
        str,
        typer.Option(help="Of the KV cache; auto: the model's own."),
    ] = "auto",
    tensor_parallel_size: Annotated[
        int, typer.Option(min=1, help="As vLLM is given it: every rank has tables of its own.")
    ] = 1,
    revision: Annotated[
        str | None, typer.Option(help="Of a hub model, as vLLM is given it.")
    ] = None,
    model_id: Annotated[
        str | None, typer.Option(help="The producer's model_id, if it is configured.")
    ] = None,
) -> None:
    """Learn the tables of the codec klt ahead of time. A producer learns them by itself anyway."""
    from lynx_connector.cli.run_calibrate import Target, run

    target = Target(model, tables_dir, dtype, tensor_parallel_size, revision, model_id)
    run(target, [*text, *(more_texts or [])], tokens)


@bench_app.command("codec")
def bench_codec(
    model: Annotated[Path, typer.Option(help="Model folder.")],
    text: Annotated[list[Path], typer.Option(help="Text files.", metavar="FILE...")],
    json_path: Annotated[Path, typer.Option("--json", help="Where the report is written.")],
    png: Annotated[Path | None, typer.Option(help="Picture: quality against bits.")] = None,
    starts: Annotated[int, typer.Option(help="Prompts made of each text.")] = 5,
    codec: Annotated[
        list[str] | None, typer.Option(help="Row to measure; repeat it for more. Default: all.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens taken of each text.")] = 2000,
    dtype: Annotated[str, typer.Option(help="Of the KV cache.")] = "bfloat16",
    more_texts: _MoreTexts = None,
) -> None:
    """Every codec on real KV tensors: bits, errors, and what becomes of the drafts."""
    from lynx_connector.cli.run_bench_codec import run

    texts = [*text, *(more_texts or [])]
    run(model, texts, json_path, png, starts, codec or [], prompt_tokens, dtype)


@bench_app.command("kernels")
def bench_kernels(
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Where the report is written.")
    ] = None,
    codec: Annotated[
        list[str] | None, typer.Option(help="Codec; repeat it for more. Default: all.")
    ] = None,
    head_dim: Annotated[
        list[int] | None, typer.Option(help="Head size; repeat it for more. Default: 64, 128.")
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="Of the KV cache; repeat it for more. Default: bfloat16."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Of the prompt. Default: 512 on CPU, 8192 on a GPU.")
    ] = None,
) -> None:
    """Encoding and decoding on this machine's GPU, or one CPU core, against a plain copy."""
    from lynx_connector.cli.run_bench_kernels import run

    run(json_path, codec or [], head_dim or [], dtype or [], tokens)
