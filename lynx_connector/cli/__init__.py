# SPDX-License-Identifier: Apache-2.0
"""The command `lynx`. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lynx_connector.testbed.launch import Role

app = typer.Typer(
    name="lynx",
    help="Speculative start for disaggregated vLLM: servers, demo and checks.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
)

bench_app = typer.Typer(
    help="Measure codecs on real KV tensors, kernels on this machine, and whole servers.",
    no_args_is_help=True,
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
    secret_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The peer's secret_file, if it has one.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="JSON instead of lines.")] = False,
) -> None:
    """Check this machine: versions, UCX, memory, ports, and a peer. Exit status 1 if one fails."""
    from lynx_connector.cli.run_doctor import run

    run(peer, secret_file, json_output)


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


@app.command()
def warm(
    model: Annotated[
        str, typer.Argument(help="Model folder or hub name; only its config.json is read.")
    ],
    dtype: Annotated[
        str, typer.Option(help="Of the KV cache: bfloat16, float16, float32; auto: the model's.")
    ] = "auto",
    revision: Annotated[
        str | None, typer.Option(help="Of a hub model, as vLLM is given it.")
    ] = None,
) -> None:
    """Compile a model's CPU kernels now, so that its first start does not wait for them."""
    from lynx_connector.cli.run_warm import run

    run(model, dtype, revision)


@app.command()
def trace(
    events: Annotated[
        list[Path],
        typer.Argument(
            metavar="EVENTS_FILE...", help="events_file of prefill and decode instances."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the trace is written.")] = Path(
        "trace.json"
    ),
) -> None:
    """Timelines of all requests, for https://ui.perfetto.dev or chrome://tracing."""
    from lynx_connector.cli.run_trace import run

    run(events, out)


@app.command()
def plan(
    model: Annotated[
        str | None, typer.Argument(help="Model folder or hub name; only its config.json is read.")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Instead of a model: its layers,")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="its KV heads")] = None,
    head_dim: Annotated[int | None, typer.Option(help="and its head size.")] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the KV cache: bfloat16, float16, float32; auto: the model's.")
    ] = "auto",
    tensor_parallel_size: Annotated[
        int, typer.Option(help="Workers; each sends its heads over a link of the rates given.")
    ] = 1,
    tokens: Annotated[
        list[int] | None, typer.Option(help="Prompt length; repeat it for more. Default: 4096.")
    ] = None,
    link_mbit: Annotated[
        list[float] | None,
        typer.Option(help="Link rate in Mbit/s; repeat it. Default: 100, 1000, 10000, 100000."),
    ] = None,
    step_ms: Annotated[float, typer.Option(help="A decode step.")] = 30.0,
    prefill_tokens_s: Annotated[
        float | None, typer.Option(help="Speed of the prefill; none: it has the prompt cached.")
    ] = None,
    chunk_tokens: Annotated[
        int, typer.Option(help="The prefill's --max-num-batched-tokens, for streaming.")
    ] = 2048,
    token: Annotated[int, typer.Option(help="The token whose time is compared.")] = 32,
    codec: Annotated[str, typer.Option(help="Lynx's: klt or hadamard.")] = "klt",
    anchor_bits: Annotated[int, typer.Option(help="Of klt: 3, 4 or 5.")] = 4,
    final_tier: Annotated[str, typer.Option(help="residual or exact.")] = "residual",
    device: Annotated[str, typer.Option(help="Where codecs run: gpu or cpu.")] = "gpu",
    paper: Annotated[
        bool, typer.Option("--paper", help="The paper's set-up instead, and how well it is met.")
    ] = False,
    png: Annotated[Path | None, typer.Option(help="Picture: time against link rate.")] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Where the predictions are written.")
    ] = None,
) -> None:
    """Predict the first and the k-th token for bf16, int8, int4 and Lynx; where each is best."""
    from lynx_connector.cli import run_plan

    if paper:
        run_plan.run_paper(png, json_path)
        return
    model_options = run_plan.ModelOptions(
        model, layers, kv_heads, head_dim, dtype, tensor_parallel_size
    )
    conditions = run_plan.Conditions(
        tokens or [4096],
        link_mbit or [100.0, 1000.0, 10_000.0, 100_000.0],
        step_ms,
        prefill_tokens_s,
        chunk_tokens,
        token,
        codec,
        anchor_bits,
        final_tier,
        device,
    )
    run_plan.run(model_options, conditions, png, json_path)


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


@bench_app.command("e2e")
def bench_e2e(
    json_path: Annotated[Path, typer.Option("--json", help="Where the report is written.")],
    png: Annotated[Path | None, typer.Option(help="Picture: 32nd token against link.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="About five minutes: fewer modes, links and prompts.")
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="Model folder or hub name; default: a small one, fetched.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="vLLM's dtype.")] = "bfloat16",
    mode: Annotated[
        list[str] | None, typer.Option(help="Mode to measure; repeat it for more. Default: all.")
    ] = None,
    link_mbit: Annotated[
        list[float] | None, typer.Option(help="Rate in Mbit/s, 0 for no limit; repeat for more.")
    ] = None,
    prompt_tokens: Annotated[list[int] | None, typer.Option(help="Repeat for more.")] = None,
    prefill: Annotated[list[str] | None, typer.Option(help="cold, cached; default: both.")] = None,
    concurrency: Annotated[
        list[int] | None, typer.Option(help="Requests at a time; repeat for more.")
    ] = None,
    repeats: Annotated[int | None, typer.Option(help="Of every combination. Default: 3.")] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Keep the rows of the --json file; measure what it lacks."),
    ] = False,
    logs: Annotated[Path, typer.Option(help="Folder for logs and events.")] = Path("e2e-logs"),
    namespaces: Annotated[
        bool, typer.Option(help="Put the servers into network namespaces where allowed (root).")
    ] = True,
) -> None:
    """Real servers on a shaped link: single vLLM, NixlConnector, Lynx. Tokens against time."""
    from lynx_connector.cli.run_bench_e2e import Chosen, run

    chosen = Chosen(mode, link_mbit, prompt_tokens, prefill, concurrency, repeats)
    run(json_path, png, quick, model, dtype, chosen, logs, namespaces, resume)


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
