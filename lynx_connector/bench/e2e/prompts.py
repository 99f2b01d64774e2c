# SPDX-License-Identifier: Apache-2.0
"""Long real prompts of an exact number of tokens, from this project's own text."""

from __future__ import annotations

from lynx_connector.bench.errors import BenchError
from lynx_connector.testbed.prompt import INSTRUCTION, QUESTION, project_text

_MARK = "\u2603"


class Prompts:
    """Prompts as token ids. Text `number` of a length begins as text `number` of any other.

    Args:
        model: folder or hub name of the tokenizer.
        longest: the most tokens that will be asked for.
    """

    def __init__(self, model: str, longest: int):
        from transformers import AutoTokenizer  # takes seconds

        tokenizer = AutoTokenizer.from_pretrained(model)
        content = f"{INSTRUCTION}{_MARK}{QUESTION}"
        if tokenizer.chat_template:
            content = tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
        head, tail = content.split(_MARK)
        self._head = tokenizer.encode(head, add_special_tokens=False)
        self._tail = tokenizer.encode(tail, add_special_tokens=False)
        self._ids = tokenizer.encode(project_text()[0], add_special_tokens=False)
        self._stride = longest
        self.count = len(self._ids) // longest
        """How many texts share no token."""

    def get(self, number: int, tokens: int) -> list[int]:
        """Text `number` as a prompt of exactly `tokens` tokens.

        Raises:
            BenchError: the text at hand is too short for it.
        """
        own = tokens - len(self._head) - len(self._tail)
        first = number * self._stride
        if own < 1 or first + own > len(self._ids):
            raise BenchError(
                f"--prompt-tokens {tokens}: the text at hand gives {len(self._ids)} tokens, "
                f"and prompt {number} needs those from {first} to {first + own}"
            )
        return [*self._head, *self._ids[first : first + own], *self._tail]
