# SPDX-License-Identifier: Apache-2.0
"""A long real prompt: this project's own text, followed by a question about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lynx_connector

INSTRUCTION = "Read this text about a software project.\n\n"
QUESTION = "\n\nExplain in your own words what this project does and how it works."


class PromptError(RuntimeError):
    """There is not enough text for the prompt that was asked for."""


def text_files() -> list[Path]:
    """Papers of the repository, best first, then sources; in an installed package the sources."""
    package = Path(lynx_connector.__file__).parent
    root = package.parent
    papers: list[Path] = []
    if (root / "pyproject.toml").exists():
        papers = [root / "README.md", root / "docs" / "architecture.md"]
        papers += sorted((root / "docs").rglob("*.md")) + sorted(root.glob("*.md"))
    sources = sorted(package.rglob("*.py"))
    return [file for file in dict.fromkeys(papers + sources) if file.is_file()]


def chat_prompt(model: str, tokens: int) -> list[dict[str, str]]:
    """Chat messages that come to about `tokens` tokens (never fewer, at most about 1 % more).

    Raises:
        PromptError: the project's text is shorter than that.
    """
    from transformers import AutoTokenizer  # takes seconds

    tokenizer = AutoTokenizer.from_pretrained(model)
    frame = _count(tokenizer, _messages(""))
    text = "\n\n".join(file.read_text() for file in text_files())
    ids = tokenizer.encode(text, add_special_tokens=False)
    # Where the cut text joins the question, a few tokens merge.
    wanted = tokens - frame + 4
    if wanted > len(ids):
        raise PromptError(
            f"the project's text has {len(ids)} tokens, the prompt needs {wanted}: "
            "ask for fewer by --prompt-tokens"
        )
    return _messages(tokenizer.decode(ids[:wanted]))


def _messages(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{INSTRUCTION}{text}{QUESTION}"}]


def _count(tokenizer: Any, messages: list[dict[str, str]]) -> int:
    shown = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return len(tokenizer.encode(shown, add_special_tokens=False))
