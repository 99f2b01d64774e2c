# SPDX-License-Identifier: Apache-2.0
"""Every kind of request: stops inside drafts, logprobs, sampling, penalties, structured output."""

import json
from collections import Counter

import pytest

from .pair import prompt, tokens

GREEDY_OPTIONS = {
    "logprobs": {"logprobs": 3},
    "logit_bias": {"logit_bias": {"260": -5.0, "28": -3.0}},
    "repetition": {"repetition_penalty": 1.3},
    "presence and frequency": {"presence_penalty": 0.8, "frequency_penalty": 0.5},
    "bad_words": {"bad_words": [" the", " and"]},
    "min_tokens": {"min_tokens": 12},
    "min_p": {"min_p": 0.1},
    "allowed_token_ids": {"allowed_token_ids": list(range(200, 2000))},
}


@pytest.mark.parametrize("name", GREEDY_OPTIONS)
def test_greedy_options(pair, name):
    result = pair.assert_same(prompt(70), max_tokens=24, **GREEDY_OPTIONS[name])
    if name == "logprobs":
        ours, theirs = (
            r["choices"][0]["logprobs"] for r in (result["answer"], result["reference"])
        )
        assert len(ours["token_logprobs"]) == len(theirs["token_logprobs"]) == 24
        for a, b in zip(ours["token_logprobs"], theirs["token_logprobs"], strict=True):
            assert abs(a - b) < 1e-3


def test_stop_token_inside_right_drafts(pair):
    text = prompt(71)
    reference = tokens(pair.blocking(text, max_tokens=24, ignore_eos=True))
    stop = reference[2]
    result = pair.assert_same(text, max_tokens=24, stop_token_ids=[stop])
    assert result["answer"]["choices"][0]["finish_reason"] == "stop"
    assert len(tokens(result["answer"])) == reference.index(stop) + 1


def test_stop_token_only_in_wrong_drafts(pair):
    """A draft that the refined cache refutes must not end the request."""
    for seed in range(72, 132):
        text = prompt(seed, items=60)
        since = pair.mark()
        answer = pair.lynx(text, max_tokens=40, ignore_eos=True)
        pair.forget()
        verified = pair.events(since, "verified")
        wrong = verified[0]["rejected_token"] if verified else None
        if wrong is not None and wrong not in tokens(answer):
            break
    else:
        pytest.fail("60 prompts without a wrong draft")
    for _ in range(8):  # a fast residual may leave no time to draft that far
        since = pair.mark()
        again = pair.lynx(text, max_tokens=40, ignore_eos=True, stop_token_ids=[wrong])
        pair.forget()
        assert tokens(again) == tokens(answer)
        assert again["choices"][0]["finish_reason"] == "length"
        if any(event["why"] == "eos" for event in pair.events(since, "paused")):
            return
    pytest.fail("the wrong stop token was never drafted again")


def test_stop_string_inside_drafts(pair):
    text = prompt(93)
    reference = pair.blocking(text, max_tokens=24, ignore_eos=True)["choices"][0]["text"]
    stop = reference[6:10]
    result = pair.assert_same(text, max_tokens=24, ignore_eos=True, stop=[stop])
    assert result["answer"]["choices"][0]["text"] == reference[: reference.index(stop)]


def test_structured_output(pair):
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    result = pair.assert_same(prompt(94), max_tokens=30, structured_outputs={"json": schema})
    text = result["answer"]["choices"][0]["text"]
    if result["answer"]["choices"][0]["finish_reason"] == "stop":
        assert isinstance(json.loads(text)["n"], int)
    assert text.lstrip().startswith("{")


def test_seeded_sampling_is_reproducible_beside_greedy_requests(pair):
    text, greedy = prompt(95), prompt(96)
    expected = tokens(pair.blocking(greedy))
    body = {"temperature": 0.7, "seed": 11, "max_tokens": 16, "ignore_eos": True}
    reference = tokens(pair.blocking(text, **body))
    runs = []
    for _ in range(2):
        sampled, plain = pair.many(
            [
                lambda: pair.lynx(text, **body),
                lambda: pair.lynx(greedy),
            ]
        )
        runs.append(tokens(sampled))
        assert tokens(plain) == expected
        pair.forget()
    assert runs == [reference, reference]


@pytest.mark.parametrize("seeded", [False, True])
def test_sampling_keeps_the_distribution(pair, seeded):
    """First sampled token at temperature 0.7 over three candidates: speculative against plain.

    A two-sample chi-square; the bound is passed by chance once in about 10^5 runs.
    """
    ids = pair.prompt_ids(prompt(97, items=6))
    body = {"temperature": 0.7, "top_k": 3, "max_tokens": 3, "ignore_eos": True}

    def draw(start, count, speculative):
        def one(i):
            extra = {"seed": start + i} if seeded else {}
            if not speculative:
                extra["vllm_xargs"] = {"lynx_start": "blocking"}
            # Shorter than a block, so the prefix cache never helps.
            return tuple(tokens(pair.lynx(ids, **body, **extra)))

        counts = Counter()
        for base in range(0, count, 10):
            counts.update(pair.many([lambda i=i: one(i) for i in range(base, base + 10)]))
        return counts

    since = pair.mark()
    ours = draw(1000, 40, True)
    drafted = sum(event["drafted"] for event in pair.events(since, "verified"))
    assert drafted > 20 if not seeded else drafted == 0  # V1: a seed waits for the final tier
    theirs = draw(5000, 40, False)
    statistic, degrees = chi_square(ours, theirs)
    assert degrees >= 1, "the prompt leaves no choice"
    assert statistic < degrees + 5 * (2 * degrees) ** 0.5 + 9
    pair.forget()


def chi_square(a, b):
    """Two-sample statistic and degrees of freedom, cells with fewer than 10 pooled."""
    cells, rest = [], [0, 0]
    for key in set(a) | set(b):
        if a[key] + b[key] >= 10:
            cells.append((a[key], b[key]))
        else:
            rest = [rest[0] + a[key], rest[1] + b[key]]
    if sum(rest):
        cells.append(tuple(rest))
    na, nb = sum(a.values()), sum(b.values())
    statistic = 0.0
    for x, y in cells:
        ea, eb = (x + y) * na / (na + nb), (x + y) * nb / (na + nb)
        statistic += (x - ea) ** 2 / ea + (y - eb) ** 2 / eb
    return statistic, len(cells) - 1
