# SPDX-License-Identifier: Apache-2.0
"""A wrong token is seen, wherever it is; a near tie of the reference is not taken for one."""

import pytest

from tests.soak import reference
from tests.soak.client import Answer, Choice
from tests.soak.kinds import COMPLETIONS, Case, Compare, Route
from tests.soak.reference import Turn, Verdict, judge

IDS, TEXT = [5, 6, 7, 8], "abcd"
FAR, NEAR = 0.5, reference.NEAR_TIE / 10


def case(compare=Compare.GREEDY, route=Route.ROUTER, choices=1, **body):
    return Case("greedy", "greedy-1-1", COMPLETIONS, body, compare, route, choices=choices)


def expected(gaps=(FAR,) * 4, logprobs=(-0.5,) * 4):
    return Turn({}, [Choice(TEXT, IDS, "length", list(gaps), list(logprobs))])


def got(text=TEXT, ids=IDS, finish="length", logprobs=()):
    return Answer([Choice(text, list(ids), finish, logprobs=list(logprobs))])


def test_the_same_is_equal():
    assert judge(case(), expected(), got()) == (Verdict.EQUAL, "")


@pytest.mark.parametrize("at", range(4))
def test_one_other_token_is_wrong(at):
    ids = [id_ + 1 if index == at else id_ for index, id_ in enumerate(IDS)]
    verdict, detail = judge(case(), expected(), got(ids=ids))
    assert verdict is Verdict.WRONG
    assert f"token {at}," in detail


@pytest.mark.parametrize(
    "answer",
    [
        got(ids=IDS[:3]),
        got(ids=[*IDS, 9]),
        got(text="abce"),
        got(finish="stop"),
        Answer(got().choices * 2),
    ],
)
def test_other_lengths_texts_ends_and_numbers_are_wrong(answer):
    assert judge(case(), expected(), answer)[0] is Verdict.WRONG


def test_a_difference_at_a_near_tie_is_told_apart():
    gaps = [FAR, FAR, NEAR, FAR]
    assert judge(case(), expected(gaps), got(ids=[5, 6, 1, 8]))[0] is Verdict.NEAR_TIE
    # A near tie elsewhere is no excuse, ahead of it or behind.
    assert judge(case(), expected(gaps), got(ids=[5, 1, 7, 8]))[0] is Verdict.WRONG
    assert judge(case(), expected(gaps), got(ids=[5, 6, 7, 1]))[0] is Verdict.WRONG


def test_with_stop_strings_the_text_counts_not_what_came_behind_it():
    stopped = case(stop=["cd"])
    assert judge(stopped, expected(), got(ids=[*IDS, 9]))[0] is Verdict.EQUAL
    assert judge(stopped, expected(), got(text="abc"))[0] is Verdict.WRONG


def test_logprobs_are_compared_where_they_were_asked_for():
    asked = case(logprobs=2)
    assert judge(asked, expected(), got(logprobs=[-0.5] * 4))[0] is Verdict.EQUAL
    assert judge(asked, expected(), got(logprobs=[-0.5, -0.5, -0.6, -0.5]))[0] is Verdict.WRONG
    assert judge(asked, expected(), got(logprobs=[-0.5] * 3))[0] is Verdict.WRONG


def test_seeded_answers_that_differ_are_counted_apart():
    verdict, _ = judge(case(Compare.SEEDED), expected(), got(ids=[5, 1, 7, 8]))
    assert verdict is Verdict.SEEDED_DIFFERS


def test_sampled_answers_need_tokens_and_the_right_number_of_choices():
    sampled = case(Compare.SHAPE, choices=2)
    both = Answer(got().choices * 2)
    assert judge(sampled, Turn({}, []), both)[0] is Verdict.SHAPED
    assert judge(sampled, Turn({}, []), got())[0] is Verdict.WRONG
    both.choices[1] = Choice(finish="length")
    assert judge(sampled, Turn({}, []), both)[0] is Verdict.WRONG


def test_what_must_be_refused_may_not_be_answered():
    assert judge(case(Compare.REFUSED), Turn({}, []), got())[0] is Verdict.WRONG


def test_kept_answers_are_the_same_and_of_the_same_cases(tmp_path):
    path, turns = tmp_path / "reference.json", {"greedy-1-1": [expected()]}
    assert reference.load(path, [case()]) is None
    reference.save(path, [case()], turns)
    assert reference.load(path, [case()]) == turns
    assert reference.load(path, [case(max_tokens=9)]) is None
