# SPDX-License-Identifier: Apache-2.0
"""Every sampling parameter: outputs, logprobs and distributions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .registry import case, same, tokens

if TYPE_CHECKING:
    from ..harness import Harness


def equal(h: Harness, prompt: str, **params: Any) -> Any:
    """Outputs and logprobs equal those of an ordinary request, for long and short drafts."""
    reference = h.reference(prompt, **params)
    for residual in (20, 4):
        name = h.lynx(prompt, residual=residual, **params)
        output = h.run()[name]
        same(output, reference)
        got = output.outputs[0].logprobs
        assert (got is None) == (reference.logprobs is None)
        for ours, theirs in zip(got or [], reference.logprobs or [], strict=True):
            assert ours.keys() == theirs.keys()
            for token, value in ours.items():
                assert abs(value.logprob - theirs[token].logprob) < 1e-4
                assert value.rank == theirs[token].rank
        h.settle()
    return reference


@case
def logprobs(h: Harness) -> None:
    equal(h, "B", logprobs=3)
    equal(h, "B", logprobs=0)


@case
def logprobs_in_a_mixed_batch(h: Harness) -> None:
    reference = h.reference("A", logprobs=2)
    name = h.lynx("A", residual=22, logprobs=2)
    h.force(list(reference.token_ids))
    h.lynx("B", residual=22)
    h.add("C", logprobs=7, max_tokens=27)
    output = h.run()[name]
    same(output, reference)
    for ours, theirs in zip(output.outputs[0].logprobs, reference.logprobs, strict=True):
        assert {t: round(v.logprob, 3) for t, v in ours.items()} == {
            t: round(v.logprob, 3) for t, v in theirs.items()
        }


@case
def min_p_and_top_k(h: Harness) -> None:
    equal(h, "B", min_p=0.1, top_k=5)


@case
def logit_bias(h: Harness) -> None:
    equal(h, "B", logit_bias={h.reference("B").token_ids[0]: -20.0})


@case
def allowed_token_ids(h: Harness) -> None:
    equal(h, "B", allowed_token_ids=[3, 30, 77, 200, 300, 411])


@case
def repetition_penalty(h: Harness) -> None:
    equal(h, "B", repetition_penalty=1.3)


@case
def output_penalties(h: Harness) -> None:
    equal(h, "A", presence_penalty=1.0, frequency_penalty=0.6, repetition_penalty=1.1)
    how = "rows" if h.v2 else "rewind"
    h.run()
    name = h.lynx("B", presence_penalty=0.7)
    h.run()
    assert name
    assert [event["how"] for event in h.events("verify_started")] == [how]


@case
def what_shadows_cannot_carry_is_rewound(h: Harness) -> None:
    reference, other_reference = h.reference("A", logprobs=0), h.reference("C")
    h.scheduler._verifier._opaque = True
    name, other = h.lynx("A", logprobs=0), h.add("C")
    outputs = h.run()
    same(outputs[name], reference)
    same(outputs[other], other_reference)
    assert [event["how"] for event in h.events("verify_started")] == ["rewind"]
    assert h.verified()["accepted"] == 0


@case
def penalties_with_min_tokens(h: Harness) -> None:
    """A rewind must also restore what the runner keeps per output, such as min_tokens."""
    ids = h.reference("B", presence_penalty=0.7).token_ids
    equal(h, "B", presence_penalty=0.7, min_tokens=12, stop_token_ids=[ids[2], ids[5]])


@case
def min_tokens(h: Harness) -> None:
    ids = h.reference("B").token_ids
    equal(h, "B", min_tokens=8, stop_token_ids=[ids[2], ids[9]])
    equal(h, "B", min_tokens=24, stop_token_ids=[ids[2], ids[9]])


@case
def bad_words(h: Harness) -> None:
    ids = h.reference("B").token_ids
    words = [w for w in map(h.tokenizer.decode, ids) if w.isascii() and w.strip()][:3]
    assert words
    reference = equal(h, "B", bad_words=words)
    assert list(reference.token_ids) != list(ids)


@case
def prompt_logprobs_load_nothing(h: Harness) -> None:
    reference = h.reference("C", prompt_logprobs=1)
    name = h.lynx("C", prompt_logprobs=1)
    output = h.run()[name]
    same(output, reference)
    assert len(output.prompt_logprobs) == len(h.prompts["C"])
    assert not h.events("drafting")


@case
def seeded_sampling_is_reproducible(h: Harness) -> None:
    runs = []
    for _ in range(2):
        name = h.lynx("A", bits=8, temperature=0.8, seed=7)
        runs.append(tokens(h.run()[name]))
        h.settle()
    assert runs[0] == runs[1]
    if h.v2:  # drafts and rows see the noise of an ordinary run with this seed
        assert runs[0] == list(h.reference("A", temperature=0.8, seed=7).token_ids)


@case
def coupled_noise(h: Harness) -> None:
    """An unseeded request gets a seed on V2, so that good drafts are accepted at T = 1."""
    if not h.v2:
        return
    name = h.lynx("A", bits=8, residual=20, temperature=1.0)
    h.run()
    assert name
    assert h.verified()["accepted"] >= 0.7 * h.verified()["drafted"]


@case
def distribution_at_temperature_one(h: Harness) -> None:
    """Two-sample chi-square of whole outputs, lossy drafts against ordinary requests."""
    import random
    from collections import Counter

    import numpy as np

    random.seed(1)
    np.random.seed(1)
    rounds = 8 if h.v2 else 100
    params = {"temperature": 1.0, "allowed_token_ids": [5, 300, 411], "max_tokens": 3}
    h.save("D")

    def collect(add: Callable[[], str]) -> Counter[tuple[int, ...]]:
        seen: Counter[tuple[int, ...]] = Counter()
        for _ in range(rounds):
            names = [add() for _ in range(6)]
            outputs = h.run()
            seen.update(tuple(tokens(outputs[name])) for name in names)
            h.settle()
        return seen

    lossy = collect(lambda: h.lynx("D", anchor=1, residual=5, bits=2, **params))
    plain = collect(lambda: h.add("D", **params))
    statistic, freedom = _chi_square(lossy, plain)
    z = (statistic - freedom) / (2 * freedom) ** 0.5
    assert z < 4, (statistic, freedom)


def _chi_square(a: Any, b: Any) -> tuple[float, int]:
    """Of two equally large samples; cells with fewer than 8 observations are pooled."""
    cells, rest = [], [0, 0]
    for key in a | b:
        if a[key] + b[key] < 8:
            rest = [rest[0] + a[key], rest[1] + b[key]]
        else:
            cells.append((a[key], b[key]))
    if sum(rest) >= 8:
        cells.append(tuple(rest))
    assert len(cells) > 3
    return sum((x - y) ** 2 / (x + y) for x, y in cells), len(cells) - 1
