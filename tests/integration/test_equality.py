# SPDX-License-Identifier: Apache-2.0
"""The promise: token for token what an ordinary vLLM gives with the same final cache.

fp32, temperature 0. The reference waits for the final tier, so it is an ordinary decode of the very
cache that speculation ends with. Twenty prompts through a router, in each of its modes:
test_early_reply.py.
"""

import pytest

from .pair import prompt, tokens


@pytest.mark.parametrize("length", [20, 128, 256, 129, 700, 3000])
def test_prompt_lengths(pair, length):
    """Shorter than a block of 128, exactly one and two, one more, several prefill chunks, long."""
    ids = [(i * 7919) % 20000 + 1000 for i in range(length)]
    since = pair.mark()
    # All but three of 20 tokens travel exact: both tiers of those may land in one step.
    pair.assert_same(ids, must_draft=length > 20, max_tokens=24, ignore_eos=True)
    admitted = [e for e in pair.events(since, "admitted") if e["start"] == "speculative"]
    assert admitted[0]["prompt_tokens"] == length


def test_prompt_of_one_token(pair):
    """Nothing to fetch: the first decode step computes the only token itself."""
    plain = pair.completion([500], max_tokens=8, ignore_eos=True)
    pair.forget()
    answer = pair.lynx([500], max_tokens=8, ignore_eos=True)
    assert tokens(answer) == tokens(plain)


@pytest.mark.parametrize("max_tokens", [2, 3, 10])  # 1: test_first_token.py
def test_max_tokens(pair, max_tokens):
    result = pair.assert_same(prompt(31), max_tokens=max_tokens, ignore_eos=True)
    assert len(tokens(result["answer"])) == max_tokens
    assert result["answer"]["choices"][0]["finish_reason"] == "length"


def test_same_prompt_twice_at_once(pair):
    text = prompt(32)
    reference = tokens(pair.blocking(text))
    answers = pair.many([lambda: pair.lynx(text), lambda: pair.lynx(text)])
    assert [tokens(answer) for answer in answers] == [reference, reference]
    pair.forget()


def test_prefix_cached_in_part_is_not_fetched_again(pair):
    text = prompt(33, items=40)
    reference = tokens(pair.blocking(text))
    ids = pair.prompt_ids(text)
    pair.blocking_keep(ids[:300])
    since = pair.mark()
    answer = pair.lynx(text)
    assert tokens(answer) == reference
    admitted = pair.events(since, "admitted")[0]
    assert admitted["local_tokens"] == 256
    moved = sum(pair.events(since, "refined")[0]["wire_bytes"].values())
    assert moved < 0.6 * pair.bytes_of(len(ids))
    pair.forget()


def test_prefix_cached_in_full_fetches_the_tail_only(pair):
    ids = pair.prompt_ids(prompt(34, items=60))[:257]
    reference = tokens(pair.blocking(ids))
    first = pair.lynx(ids)
    since = pair.mark()
    again = pair.lynx(ids)
    assert tokens(first) == tokens(again) == reference
    # 256 of 257 tokens are local, and the last one is computed by the first step anyway.
    assert not pair.events(since, "admitted")
    pair.forget()


def test_eight_at_once_beside_requests_without_transfer(pair):
    texts = [prompt(40 + i, items=15 + 3 * i) for i in range(8)]
    reference = [tokens(pair.blocking(text, ignore_eos=True)) for text in texts]
    plain = [prompt(60 + i) for i in range(3)]
    expected = [tokens(pair.completion(text, ignore_eos=True)) for text in plain]
    pair.forget()
    calls = [lambda t=t: pair.lynx(t, ignore_eos=True) for t in texts]
    calls += [lambda t=t: pair.completion(t, ignore_eos=True) for t in plain]
    answers = [tokens(answer) for answer in pair.many(calls)]
    assert answers == reference + expected
    pair.forget()
