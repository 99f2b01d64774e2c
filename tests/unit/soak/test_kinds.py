# SPDX-License-Identifier: Apache-2.0
"""The cases of a soak can be made again, and every kind can be chosen by name."""

import pytest

from tests.soak import kinds
from tests.soak.kinds import COMPLETIONS, KINDS, Compare
from tests.soak.model import MAX_MODEL_LEN


@pytest.mark.parametrize("kind", KINDS)
def test_equal_arguments_make_equal_cases_and_others_others(kind):
    assert kinds.make(kind, 3, 5) == kinds.make(kind, 3, 5)
    assert kinds.make(kind, 3, 5).body != kinds.make(kind, 4, 5).body


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_to_be_refused_fits_the_model(kind):
    for number in range(30):
        case = kinds.make(kind, 1, number)
        prompt = case.body.get("prompt") if case.path == COMPLETIONS else None
        if isinstance(prompt, list) and isinstance(prompt[0], int):
            fits = len(prompt) + case.body["max_tokens"] <= MAX_MODEL_LEN
            assert fits == (case.compare is not Compare.REFUSED)


def test_a_pool_has_every_kind_and_no_name_twice():
    pool = kinds.pool(["greedy", "chat", "stop"], 1, 30)
    assert {case.kind for case in pool} == {"greedy", "chat", "stop"}
    assert len({case.name for case in pool}) == 30
    assert any(case.stream for case in pool) and not all(case.stream for case in pool)


def test_kinds_that_fail_today_come_only_by_name():
    chosen = kinds.choose([], ["greedy"])
    assert set(chosen) == set(KINDS) - set(kinds.FAILING_TODAY) - {"greedy"}
    for name in kinds.FAILING_TODAY:
        assert kinds.choose([name], []) == [name]


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="no kind gredy"):
        kinds.choose(["gredy"], [])
    with pytest.raises(ValueError, match="no kind is left"):
        kinds.choose(["greedy"], ["greedy"])
