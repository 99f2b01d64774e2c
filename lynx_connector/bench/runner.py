# SPDX-License-Identifier: Apache-2.0
"""Measures rows on texts, one text in memory at a time.

A text's KV is computed once, sent once by each method, and shared by the text's starts; only the
few tokens of each question are computed and sent anew. Token 0 and the last tokens of a prompt are
exact, as the product sends them, and count with the bits of the cache's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from lynx_connector.bench.hf_model import HFModel, Past, make_past
from lynx_connector.bench.learning import TwoFolds
from lynx_connector.bench.methods import Delivered, Method
from lynx_connector.bench.metrics import (
    ANSWER_TOKENS,
    SHORT_RUN,
    Reference,
    agreeing,
    kl_divergence,
    vnmse,
)
from lynx_connector.bench.rows import Row
from lynx_connector.bench.texts import PromptedText, build_prompts
from lynx_connector.config import EXACT_FIRST_TOKENS, LynxConfig

Step = Callable[[str], None]

EXACT_LAST_TOKENS = int(LynxConfig.model_fields["exact_last_tokens"].default)


@dataclass
class _Start:
    """One prompt: the tokens behind the text's common prefix, and the answer to agree with."""

    ids: list[int]
    tail: torch.Tensor
    reference: Reference

    def answer_input(self) -> list[int]:
        """What is fed to predict the answer's tokens: the prompt's last token, then the answer."""
        return [self.ids[-1], *self.reference.tokens[:-1].tolist()]


@dataclass
class _Samples:
    """One row's measurements: one entry a text (vnmse) or a start (the rest)."""

    vnmse_anchor: list[tuple[float, float]] = field(default_factory=list)
    vnmse_final: list[tuple[float, float]] = field(default_factory=list)
    anchor_bits: list[float] = field(default_factory=list)
    total_bits: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    refined: list[int] = field(default_factory=list)
    mismatches: int | None = None

    def summary(self, name: str) -> dict[str, Any]:
        """The row of the report."""
        short = [min(count, SHORT_RUN) for count in self.accepted]
        row = {
            "codec": name,
            "anchor_bits": fmean(self.anchor_bits),
            "total_bits": fmean(self.total_bits),
            "vnmse_k_anchor": fmean(k for k, _ in self.vnmse_anchor),
            "vnmse_v_anchor": fmean(v for _, v in self.vnmse_anchor),
            "vnmse_k": fmean(k for k, _ in self.vnmse_final),
            "vnmse_v": fmean(v for _, v in self.vnmse_final),
            "kl": fmean(self.kl),
            "accepted24": fmean(short),
            "accepted64": fmean(self.accepted),
            "full24": fmean(float(count == SHORT_RUN) for count in short),
            "refined_agree64": fmean(self.refined),
        }
        if self.mismatches is not None:
            row["exact_mismatches"] = self.mismatches
        return row


def measure(
    model: HFModel,
    files: Sequence[Path],
    rows: Sequence[Row],
    starts: int,
    prompt_tokens: int,
    step: Step = lambda what: None,
) -> dict[str, Any]:
    """The report: {"model", "texts", "starts", "rows"}.

    starts: prompts per text; prompt_tokens: tokens taken of each text; step: told what was done,
    `count_steps` times in all. Raises BenchError for a text or model that cannot be measured.
    """
    folds = TwoFolds(model, files, prompt_tokens) if any(row.tables for row in rows) else None
    if folds is not None:
        folds.learn(step)
    samples = {row.name: _Samples() for row in rows}
    for number, file in enumerate(files):
        text = build_prompts(model.tokenizer, file, prompt_tokens, starts)
        prefix, prompts = _prepare(model, text, step)
        tables = folds.tables_for(number) if folds is not None else None
        for row in rows:
            method = row.build(model.geometry, tables)
            _measure_text(model, method, prefix, prompts, samples[row.name])
            step(f"{text.name}: {row.name}")
    return {
        "model": Path(model.name).resolve().name,
        "texts": [file.name for file in files],
        "starts": len(files) * starts,
        "rows": [samples[row.name].summary(row.name) for row in rows],
    }


def check_prompts(model: HFModel, files: Sequence[Path], starts: int, prompt_tokens: int) -> None:
    """Raises BenchError for what would end `measure` after many minutes."""
    for file in files:
        prompts = build_prompts(model.tokenizer, file, prompt_tokens, starts).prompts
        model.check_length(max(map(len, prompts)) + ANSWER_TOKENS)


def count_steps(files: Sequence[Path], rows: Sequence[Row]) -> int:
    """How often `measure` calls `step`."""
    learned = len(files) if any(row.tables for row in rows) else 0
    return learned + len(files) * (1 + len(rows))


def _prepare(model: HFModel, text: PromptedText, step: Step) -> tuple[torch.Tensor, list[_Start]]:
    """KV of the common prefix, and every start with its answer."""
    prefix = model.prefill(text.prompts[0][: text.prefix])
    prompts = []
    for ids in text.prompts:
        # The prompt's last token is computed by the decode instance, so its KV is not sent.
        tail_ids = ids[text.prefix : -1]
        tail = model.prefill(tail_ids, prefix) if tail_ids else prefix[:0]
        past = make_past(prefix, tail, room=ANSWER_TOKENS)
        tokens = model.greedy(past, ids[-1], ANSWER_TOKENS)
        logits = model.logits(past, [ids[-1], *tokens[:-1]])
        prompts.append(_Start(ids, tail, Reference.of(tokens, logits)))
    step(f"{text.name}: reference")
    return prefix, prompts


def _measure_text(
    model: HFModel,
    method: Method,
    prefix: torch.Tensor,
    prompts: Sequence[_Start],
    samples: _Samples,
) -> None:
    first = EXACT_FIRST_TOKENS
    body = method.deliver(prefix[first:], first)
    samples.vnmse_anchor.append(vnmse(body.anchor, prefix[first:]))
    samples.vnmse_final.append(vnmse(body.final, prefix[first:]))
    two_tiers = body.final is not body.anchor
    for start in prompts:
        tokens = len(prefix) + len(start.tail)
        lossy = max(tokens - EXACT_LAST_TOKENS, first)
        question = method.deliver(start.tail[: max(lossy - len(prefix), 0)], len(prefix))
        sent = prefix[:first], body, question, prefix, start.tail
        logits = model.logits(_held(*sent, lossy, anchor=True), start.answer_input())
        samples.kl.append(kl_divergence(start.reference, logits))
        samples.accepted.append(agreeing(start.reference, logits))
        if two_tiers:
            logits = model.logits(_held(*sent, lossy, anchor=False), start.answer_input())
        samples.refined.append(agreeing(start.reference, logits))
        # Bits of the body count in full only where all of it is sent by the codec.
        share = (min(lossy, len(prefix)) - first) / (len(prefix) - first)
        exact = (tokens - lossy + first) * prefix[0].numel() * 8 * prefix.element_size()
        elements = tokens * prefix[0].numel()
        for bits, sizes in (
            (samples.anchor_bits, (body.anchor_bits, question.anchor_bits)),
            (samples.total_bits, (body.total_bits, question.total_bits)),
        ):
            bits.append((sizes[0] * share + sizes[1] + exact) / elements)
        if question.exact_mismatches is not None:
            samples.mismatches = (samples.mismatches or 0) + question.exact_mismatches
    if body.exact_mismatches is not None:
        samples.mismatches = (samples.mismatches or 0) + body.exact_mismatches


def _held(
    sink: torch.Tensor,
    body: Delivered,
    question: Delivered,
    prefix: torch.Tensor,
    tail: torch.Tensor,
    lossy: int,
    *,
    anchor: bool,
) -> Past:
    """The decode instance's cache: exact, lossy and again exact tokens.

    lossy: position of the first exact token at the end.
    """
    inner, behind = (part.anchor if anchor else part.final for part in (body, question))
    split = min(lossy, len(prefix))
    ends = prefix[split:], behind, tail[max(lossy - len(prefix), 0) :]
    return make_past(sink, inner[: split - len(sink)], *ends, room=ANSWER_TOKENS)
