# SPDX-License-Identifier: Apache-2.0
"""From text files to prompts: one text in the chat template, followed by one of the questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from lynx_connector.bench.errors import BenchError

MIN_TOKENS = 256
"""A shorter text says little about a codec for long prompts."""

QUESTIONS = (
    "Summarize the text above in a few sentences.",
    "What are the most important points? Answer as a list.",
    "Explain to a beginner what this text is about.",
    "Which terms does the text define or use most? Explain two of them.",
    "Write a short question about the text and answer it.",
    "What would a critical reader object to in this text?",
    "Give the text a title and say in three sentences why it fits.",
    "Quote the first sentence of the text and say what follows it.",
)


@dataclass(frozen=True)
class PromptedText:
    """One text with all its prompts.

    prompts: token ids of each prompt; all begin with the same `prefix` tokens, whose KV they share.
    """

    name: str
    prompts: list[list[int]]
    prefix: int


def read_text(file: Path) -> str:
    """The file's text. Raises BenchError if it cannot be read or is empty."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise BenchError(f"text {file}: {error.strerror or error}") from None
    if not text.strip():
        raise BenchError(f"text {file} is empty")
    return text


def cut_text(tokenizer: Any, file: Path, tokens: int) -> str:
    """The first `tokens` tokens of the file, as text; a shorter file is used whole.

    Raises BenchError for a file that cannot be read, or is shorter than `MIN_TOKENS`.
    """
    # No need to show a tokenizer megabytes.
    text = read_text(file)[: 32 * tokens]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) < min(MIN_TOKENS, tokens):
        raise BenchError(
            f"text {file} has {len(ids)} tokens, shorter than a prompt: "
            f"at least {min(MIN_TOKENS, tokens)} are needed"
        )
    return tokenizer.decode(ids[:tokens])


def build_prompts(tokenizer: Any, file: Path, tokens: int, starts: int) -> PromptedText:
    """`starts` prompts around the first `tokens` tokens of `file`.

    Raises BenchError as `cut_text`, and for more starts than there are questions.
    """
    check_starts(starts)
    body = cut_text(tokenizer, file, tokens)
    prompts = [_prompt(tokenizer, f"{body}\n\n{question}") for question in QUESTIONS[:starts]]
    shared = sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, zip(*prompts, strict=False)))
    # The last token of a prompt is computed by whoever decodes: it is never part of the prefix.
    return PromptedText(file.name, prompts, min(shared, *(len(ids) - 1 for ids in prompts)))


def check_starts(starts: int) -> None:
    """Raises BenchError for more prompts of a text than there are questions, or none."""
    if not 1 <= starts <= len(QUESTIONS):
        raise BenchError(f"--starts {starts}: 1 to {len(QUESTIONS)} prompts can be made of a text")


def check_texts(files: Sequence[Path]) -> None:
    """Read every file before hours are spent. Raises BenchError for the first bad one."""
    for file in files:
        read_text(file)


def _prompt(tokenizer: Any, content: str) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        return list(tokenizer(content)["input_ids"])
    message = [{"role": "user", "content": content}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
