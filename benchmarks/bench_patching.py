# SPDX-License-Identifier: Apache-2.0
"""What patching blocks while drafts are made brings in accepted drafts.

    python benchmarks/bench_patching.py --model FOLDER --text FILE... [--drafts 24] [--starts 3]

The same drafts twice: on the anchor alone, and with the residual landing evenly from the first
draft to the last, in token order, as frames land on a slow link. Drafts are accepted up to the
first that the refined cache would not have given. Real KV, transformers' attention, codec `klt`
with tables learned from the texts that are not measured.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean

import torch

from lynx_connector.bench.hf_model import HFModel, Past, make_past
from lynx_connector.bench.learning import TwoFolds
from lynx_connector.bench.methods import CodecMethod
from lynx_connector.bench.runner import EXACT_LAST_TOKENS
from lynx_connector.bench.texts import build_prompts
from lynx_connector.codec import KltCodec
from lynx_connector.config import EXACT_FIRST_TOKENS


class Landing:
    """Writes refined tokens into a cache that holds their anchors, a share before each draft."""

    def __init__(self, past: Past, refined: torch.Tensor, first: int, drafts: int):
        self._past, self._refined, self._first, self._drafts = past, refined, first, drafts
        self._landed = 0

    def __call__(self, draft: int) -> None:
        until = len(self._refined) * draft // (self._drafts - 1)
        new = self._refined[self._landed : until].permute(1, 2, 3, 0, 4).float()
        place = slice(self._first + self._landed, self._first + until)
        for (k, v), layer in zip(self._past.buffers, new, strict=True):
            k[0, :, place], v[0, :, place] = layer
        self._landed = until


def accepted(drafts: list[int], tokens: list[int]) -> int:
    """Leading drafts that are right."""
    pairs = zip(drafts, tokens, strict=True)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(drafts))


def measure(
    model: HFModel, codec: CodecMethod, ids: list[int], values: torch.Tensor, drafts: int
) -> tuple[int, int]:
    """Accepted drafts of one prompt: (anchor alone, patched meanwhile)."""
    first, last = EXACT_FIRST_TOKENS, len(values) - EXACT_LAST_TOKENS
    sent = codec.deliver(values[first:last], first)

    def past(middle: torch.Tensor) -> Past:
        return make_past(values[:first], middle, values[last:], room=drafts)

    tokens = model.greedy(past(sent.final), ids[-1], drafts)
    alone = model.greedy(past(sent.anchor), ids[-1], drafts)
    patched = past(sent.anchor)
    landing = Landing(patched, sent.final, first, drafts)
    meanwhile = model.greedy(patched, ids[-1], drafts, landing)
    return accepted(alone, tokens), accepted(meanwhile, tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--drafts", type=int, default=24)
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=2000)
    options = parser.parse_args()
    model = HFModel(options.model)
    folds = TwoFolds(model, options.text, options.prompt_tokens)
    folds.learn()
    results = []
    for number, file in enumerate(options.text):
        codec = CodecMethod(KltCodec(model.geometry, folds.tables_for(number), 4))
        text = build_prompts(model.tokenizer, file, options.prompt_tokens, options.starts)
        for ids in text.prompts:
            values = model.prefill(ids[:-1])
            results.append(measure(model, codec, ids, values, options.drafts))
            print(f"{file.name}: {results[-1][0]} alone, {results[-1][1]} patched", flush=True)
    for index, name in enumerate(("anchor alone", "patched meanwhile")):
        counts = [result[index] for result in results]
        full = fmean(count == options.drafts for count in counts)
        print(f"{name}: {fmean(counts):.2f} of {options.drafts} accepted, all in {full:.0%}")
    better = sum(b > a for a, b in results)
    worse = sum(b < a for a, b in results)
    print(f"{len(results)} prompts: more accepted in {better}, fewer in {worse}")


if __name__ == "__main__":
    main()
