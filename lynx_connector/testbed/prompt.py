# SPDX-License-Identifier: Apache-2.0
"""A long real prompt: this project's own text, followed by a question about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lynx_connector

INSTRUCTION = "Read this text.\n\n"
QUESTION = "\n\nList the most important points of the text, with a sentence about each."


class PromptError(RuntimeError):
    """There is not enough text for the prompt that was asked for."""


def project_text() -> tuple[str, str]:
    """(text to cut to length, text to keep whole): papers and sources, and the licence.

    An installed package has no papers and no licence beside it: its sources then are the text.
    """
    package = Path(lynx_connector.__file__).parent
    root = package.parent
    papers, licence = [], ""
    if (root / "pyproject.toml").exists():
        papers = [root / "README.md", root / "docs" / "architecture.md"]
        papers += sorted(root.glob("*.md")) + sorted((root / "docs").rglob("*.md"))
        licence = (root / "LICENSE").read_text()
    files = [file for file in dict.fromkeys(papers) if file.is_file()]
    files += sorted(package.rglob("*.py"))
    return "\n\n".join(file.read_text() for file in files), licence


def chat_prompt(model: str, tokens: int) -> list[dict[str, str]]:
    """Chat messages of `tokens` tokens, give or take a few where texts join.

    Raises:
        PromptError: the project's text is shorter than that, or its licence longer.
    """
    from transformers import AutoTokenizer  # takes seconds

    tokenizer = AutoTokenizer.from_pretrained(model)
    text, licence = project_text()
    if licence:
        licence = "\n\n" + licence
    ids = tokenizer.encode(text, add_special_tokens=False)
    wanted = tokens - _count(tokenizer, _messages(licence))
    if not 0 <= wanted <= len(ids):
        least, most = tokens - wanted, tokens - wanted + len(ids)
        raise PromptError(f"--prompt-tokens {tokens}: the text at hand gives {least} to {most}")
    return _messages(tokenizer.decode(ids[:wanted]) + licence)


def _messages(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{INSTRUCTION}{text}{QUESTION}"}]


def _count(tokenizer: Any, messages: list[dict[str, str]]) -> int:
    shown = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return len(tokenizer.encode(shown, add_special_tokens=False))
