# SPDX-License-Identifier: Apache-2.0
"""The demo: one long prompt, once with speculative start and once blocking."""

from __future__ import annotations

import json
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from lynx_connector.config import FIRST_TABLES_TOKENS
from lynx_connector.demo.live import LiveView, Run
from lynx_connector.demo.report import (
    build_report,
    comparison_table,
    summary_lines,
)
from lynx_connector.demo.timeline import save_png, terminal_timeline
from lynx_connector.testbed.client import stream_chat
from lynx_connector.testbed.cluster import Cluster, Side
from lynx_connector.testbed.launch import Role
from lynx_connector.testbed.link import Link, loopback, open_link
from lynx_connector.testbed.model import ensure_model, kv_elements_per_token
from lynx_connector.testbed.prompt import chat_prompt
from lynx_connector.testbed.trace import EventTail, Trace

REPORT = "demo-report.json"
PICTURE = "demo-timeline.png"
_EVENTS_GRACE_SECONDS = 5.0
_TABLES_SECONDS = 2.0


class DemoError(RuntimeError):
    """The demo ran, but its result is wrong."""


@dataclass(frozen=True)
class DemoOptions:
    """What a user can choose."""

    out: Path
    """Folder for the report and the picture; logs and events files go to `logs` below it."""
    link_mbit: float = 200.0
    model: str | None = None
    """Folder or hub name; default: the small model that the demo makes itself."""
    dtype: str = "float32"
    """In bfloat16 one-token and many-token steps of the same vLLM differ in the last bit, and a
    small model's exact ties then fall either way: equal tokens need float32."""
    prompt_tokens: int = 3400
    output_tokens: int = 64
    namespaces: bool = True
    """Whether to use network namespaces where it is allowed."""

    @property
    def logs(self) -> Path:
        """Folder for the servers' logs and events files."""
        return self.out / "demo-logs"


def run_demo(options: DemoOptions, console: Console) -> dict[str, Any]:
    """Run it, write report and picture into `options.out`, print the result; returns the report.

    Raises:
        DemoError: the two answers differ, or an answer is shorter than asked for.
        ModelError, PromptError, ServerError, RequestError, IncompleteRunError: see there.
    """
    model = options.model or str(ensure_model(lambda line: console.print(line)))
    options.logs.mkdir(parents=True, exist_ok=True)
    messages = chat_prompt(model, options.prompt_tokens)
    if not options.namespaces:
        return _on_link(options, model, messages, loopback(options.link_mbit), console)
    with open_link(options.link_mbit) as link:
        return _on_link(options, model, messages, link, console)


def _on_link(
    options: DemoOptions,
    model: str,
    messages: list[dict[str, str]],
    link: Link,
    console: Console,
) -> dict[str, Any]:
    console.print(f"link: {link.note}")
    _forget_last_demo(options)
    runs = [Run("speculative start"), Run("blocking")]
    with (
        LiveView(console) as view,
        Cluster(
            model, options.logs, link=link, dtype=options.dtype, prefill=_learning(options)
        ) as cluster,
    ):
        view.headline("starting prefill, decode and router (about a minute)")
        cluster.start(waiting=lambda ready: view.headline(_readiness(ready)))
        tail = EventTail([cluster.events_file(role) for role in Role])
        body = {"model": model, "temperature": 0, "ignore_eos": True}
        view.headline("warming up")
        _warm_up(cluster, body, messages, view)
        view.show(runs, tail)
        body |= {"messages": messages, "max_tokens": options.output_tokens}
        extra: list[dict[str, Any]] = [{}, {"vllm_xargs": {"lynx_start": "blocking"}}]
        traces = []
        for run, more in zip(runs, extra, strict=True):
            cluster.reset_prefix_caches()
            run.since = time.time()
            view.headline(f"{run.label}: {options.prompt_tokens} prompt tokens")
            _send(cluster, run, {**body, **more}, view)
            traces.append(_finished_trace(run, tail))
        view.headline("stopping the servers")
    lynx, blocking = zip(traces, (run.answer for run in runs), strict=True)
    report = build_report(link, model, kv_elements_per_token(model), lynx, blocking)
    (options.out / REPORT).write_text(json.dumps(report, indent=2) + "\n")
    title = f"{report['prompt_tokens']} prompt tokens, {link.note}"
    save_png(traces, options.out / PICTURE, title)
    _print_result(report, traces, options, console)
    _judge(report, options)
    return report


def _learning(options: DemoOptions) -> Side:
    """Begins without tables, as a first start does, and learns them from the warm-up alone.

    The plan is fixed: the demo shows drafts, and a fast link may be better off with a plain copy.
    """
    tables = options.logs / "tables"
    shutil.rmtree(tables, ignore_errors=True)
    lynx = {"tables_dir": str(tables.resolve()), "learn_tokens": FIRST_TABLES_TOKENS}
    return Side(lynx=lynx | {"plan": "fixed"})


def _warm_up(
    cluster: Cluster, body: dict[str, Any], messages: list[dict[str, str]], view: LiveView
) -> None:
    """First requests pay for connections, compiled kernels, tokenizers and learned tables."""
    content = messages[0]["content"]
    # From another point of the text on, so that no prefix is shared.
    turned = content[len(content) // 2 :] + content[: len(content) // 2]
    warm_up = [{"role": "user", "content": turned}]
    _send(cluster, Run("warm-up"), {**body, "messages": warm_up, "max_tokens": 4}, view)
    # Tables are built meanwhile; that they are there is reported with the steps of a next request.
    time.sleep(_TABLES_SECONDS)
    short = [{"role": "user", "content": content[-400:]}]
    _send(cluster, Run("warm-up"), {**body, "messages": short, "max_tokens": 4}, view)


def _send(cluster: Cluster, run: Run, body: dict[str, Any], view: LiveView) -> None:
    """Send one request and stream its answer; a server that dies meanwhile is the cause told."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.5):
            view.changed()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        stream_chat(cluster.url, body, run.answer)
        run.ended = True
    except Exception:
        cluster.check()
        raise
    finally:
        done.set()
        watcher.join()


def _finished_trace(run: Run, tail: EventTail) -> Trace:
    """The run's events, once the last of them is written."""
    deadline = time.monotonic() + _EVENTS_GRACE_SECONDS
    while True:
        trace = run.trace(tail)
        if (trace and trace.find("finished")) or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    if trace is None:
        raise DemoError(f"{run.label}: the servers wrote no events, so Lynx took no part in it")
    trace.token_times = run.answer.token_times
    return trace


def _readiness(ready: dict[str, bool]) -> str:
    words = [f"{name} {'ready' if is_ready else 'starting'}" for name, is_ready in ready.items()]
    return "starting servers (about a minute): " + ", ".join(words)


def _forget_last_demo(options: DemoOptions) -> None:
    for name in (REPORT, PICTURE):
        (options.out / name).unlink(missing_ok=True)
    stale = [f"events-{role}.jsonl" for role in Role]
    for name in [*stale, "prefill.log", "decode.log", "router.log"]:
        (options.logs / name).unlink(missing_ok=True)


def _print_result(
    report: dict[str, Any], traces: list[Trace], options: DemoOptions, console: Console
) -> None:
    console.print(terminal_timeline(traces, console.width))
    console.print()
    console.print(comparison_table(report))
    for line in summary_lines(report):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"report: {options.out / REPORT}", highlight=False)
    console.print(f"picture: {options.out / PICTURE}", highlight=False)


def _judge(report: dict[str, Any], options: DemoOptions) -> None:
    if not report["same_tokens_as_blocking"]:
        raise DemoError("the two answers differ; they must be the same token for token")
    if report["output_tokens"] < options.output_tokens:
        raise DemoError(
            f"{report['output_tokens']} tokens came, {options.output_tokens} were asked for"
        )
