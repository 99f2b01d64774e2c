# SPDX-License-Identifier: Apache-2.0
"""What speculative start must do, on every flavour: each case asserts on its own outputs, and the
harness asserts after each that no block, request or scheduler state is left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scheduler_harness import Harness


@dataclass(frozen=True)
class Case:
    run: Callable[[Harness], None]
    flavours: tuple[str, ...] = ("v1-sync", "v1-async", "v2-sync", "v2-async")

    def runs_on(self, flavour: str) -> bool:
        return flavour in self.flavours


CASES: dict[str, Case] = {}


def case(run: Callable[..., None] | None = None, **options: Any) -> Any:
    """Register a case under its function's name; `only` names the flavours it runs on."""

    def register(function: Callable[[Harness], None]) -> Callable[[Harness], None]:
        CASES[function.__name__] = Case(function, **options)
        return function

    return register if run is None else register(run)


def tokens(output: Any) -> list[int]:
    return list(output.outputs[0].token_ids)


def same(output: Any, reference: Any) -> None:
    """Equal tokens, text and finish."""
    got = output.outputs[0]
    assert list(got.token_ids) == list(reference.token_ids)
    assert got.text == reference.text
    assert (got.finish_reason, got.stop_reason) == (reference.finish_reason, reference.stop_reason)


# ---- drafts and acceptance


def _sweep(prompt: str, bits: int) -> Callable[[Harness], None]:
    def run(h: Harness) -> None:
        most = 36 if h.v2 else 72
        reference = h.reference(prompt, max_tokens=most)
        for k in (0, 1, 5, 31) if h.v2 else (0, 1, 5, 31, 64):
            residual = 2 + k + 2 * h.asynchronous + (8 if k == 64 else 0)
            name = h.lynx(prompt, residual=residual if k else 2, bits=bits, max_tokens=most)
            same(h.run()[name], reference)
            drafted = h.events("verified")[0]["drafted"] if h.events("verified") else 0
            assert abs(drafted - k) <= 3, (k, drafted)
            h.settle()

    return run


for _prompt, _bits in (("A", 8), ("A", 2), ("E", 3), ("F", 4), ("ONE", 8), ("D", 3)):
    CASES[f"k_sweep_{_prompt}_{_bits}bit"] = Case(
        _sweep(_prompt, _bits),
        ("v1-sync", "v1-async", "v2-sync", "v2-async")
        if (_prompt, _bits) == ("F", 4)
        else ("v1-sync", "v1-async"),
    )


@case
def forced_acceptance(h: Harness) -> None:
    reference = h.reference("A")
    for right in (0, 7, 99) if h.v2 else (0, 1, 7, 8, 20, 99):
        drafts = list(reference.token_ids)
        if right < len(drafts):
            drafts[right] = (drafts[right] + 1) % 500
        for params in ({}, {"repetition_penalty": 1.0, "logprobs": 0}):
            h.force(drafts)
            name = h.lynx("A", residual=26, **params)
            assert tokens(h.run()[name]) == list(reference.token_ids)
            event = h.verified()
            assert event["drafted"] >= 20
            assert event["accepted"] == min(right, event["drafted"])
            if right < event["drafted"]:
                assert event["rejected_token"] == drafts[right]
            else:
                assert event["rejected_token"] is None
            h.settle()


@case
def greedy_takes_one_pass(h: Harness) -> None:
    reference = h.reference("A")
    name = h.lynx("A", bits=8)
    same(h.run()[name], reference)
    assert [event["how"] for event in h.events("verify_started")] == ["one_pass"]
    assert h.verified()["steps"] == 1
    assert h.verified()["accepted"] > 5


@case
def rows_take_groups(h: Harness) -> None:
    """17 drafts and more, with 8 request slots in all, of which some are taken."""
    reference = h.reference("A", logprobs=0)
    others = {p: h.reference(p) for p in ("B", "C", "D", "E")}
    name = h.lynx("A", residual=22, logprobs=0)
    names = {h.add(p): p for p in others}
    h.force(list(reference.token_ids))
    outputs = h.run()
    same(outputs[name], reference)
    for other, prompt in names.items():
        same(outputs[other], others[prompt])
    event = h.verified()
    assert event["accepted"] == event["drafted"] >= 17
    assert event["steps"] >= 3
    assert [started["how"] for started in h.events("verify_started")] == ["rows"]


@case
def a_mismatch_saves_the_remaining_groups(h: Harness) -> None:
    reference = h.reference("A", logprobs=0)
    name = h.lynx("A", residual=40, logprobs=0)
    h.force([(reference.token_ids[0] + 1) % 500] * 64)
    same(h.run()[name], reference)
    assert h.verified()["steps"] == 1
    assert h.verified()["accepted"] == 0


# ---- the end of a request


@case
def stop_token_in_right_drafts(h: Harness) -> None:
    ids = list(h.reference("A").token_ids)
    at = next(i for i in range(4, 30) if ids[i] not in ids[:i])
    for params in ({}, {"logprobs": 0}):
        reference = h.reference("A", stop_token_ids=[ids[at]], **params)
        assert len(reference.token_ids) == at + 1
        name = h.lynx("A", residual=40, bits=8, stop_token_ids=[ids[at]], **params)
        h.force(ids[: at + 1])
        same(h.run()[name], reference)
        assert h.verified()["accepted"] <= at + 1
        h.settle()


@case
def stop_token_in_wrong_drafts(h: Harness) -> None:
    ids = list(h.reference("A").token_ids)
    stops = [token for token in range(512) if token not in ids]
    name = h.lynx("A", residual=30, bits=2, stop_token_ids=stops)
    assert tokens(h.run()[name]) == ids
    assert [event["why"] for event in h.events("paused")] == ["eos"]


@case
def end_of_sequence_drafted(h: Harness) -> None:
    reference = h.reference("B", max_tokens=60, ignore_eos=False)
    name = h.lynx("B", residual=60, max_tokens=60, ignore_eos=False)
    same(h.run()[name], reference)


@case
def stop_string(h: Harness) -> None:
    text = h.reference("A").text
    stop = next(text[i : i + 2] for i in range(5, len(text)) if text[i : i + 2].isascii())
    reference = h.reference("A", stop=[stop])
    assert reference.finish_reason == "stop"
    name = h.lynx("A", residual=30, bits=8, stop=[stop])
    same(h.run()[name], reference)


@case
def few_tokens_wanted(h: Harness) -> None:
    for most in (1, 2, 10):
        for params in ({}, {"logprobs": 0}):
            reference = h.reference("A", max_tokens=most, **params)
            name = h.lynx("A", residual=25, bits=8, max_tokens=most, **params)
            same(h.run()[name], reference)
            assert h.verified()["drafted"] == most - 1
            assert [event["why"] for event in h.events("paused")] == ["max_tokens"]
            h.settle()


@case
def draft_limit(h: Harness) -> None:
    reference = h.reference("A", max_tokens=72)
    name = h.lynx("A", residual=90, bits=8, max_tokens=72)
    same(h.run()[name], reference)
    assert h.verified()["drafted"] == h.port.draft_limit
    (paused,) = h.events("paused")
    assert (paused["why"], paused["drafts"]) == ("limit", h.port.draft_limit)


@case
def one_token_prompt(h: Harness) -> None:
    """vLLM recomputes the last prompt token, here the whole prompt: nothing is left to load."""
    reference = h.reference("ONE")
    for residual in (2, 12):
        name = h.lynx("ONE", residual=residual, bits=2)
        same(h.run()[name], reference)
        h.settle()


@case
def context_ends(h: Harness) -> None:
    h.prompts["LONG"] = (h.prompts["A"] * 6)[:505]
    reference = h.reference("LONG", max_tokens=100)
    assert len(reference.token_ids) == 7
    for residual in (6, 30):
        name = h.lynx("LONG", residual=residual, max_tokens=100)
        same(h.run()[name], reference)
        h.settle()
    name = h.lynx("LONG", residual=30, max_tokens=100)
    h.run()
    assert [event["why"] for event in h.events("paused")] == ["no_room"]


# ---- batches and the prefix cache


@case
def mixed_batch(h: Harness) -> None:
    references = {p: h.reference(p) for p in "ABCDF"}
    names = {
        h.lynx("A", residual=12, bits=3): "A",
        h.lynx("B", residual=24, bits=2): "B",
        h.lynx("C", residual=12, bits=4): "C",
        h.add("D"): "D",
    }
    late: list[str] = []

    def on_step(i: int) -> None:
        if i == 11:
            late.append(h.add("F"))

    outputs = h.run(on_step)
    for name, prompt in names.items():
        same(outputs[name], references[prompt])
    same(outputs[late[0]], references["F"])
    assert len(h.events("verified")) == 3


@case
def sibling_while_drafting_and_after(h: Harness) -> None:
    reference = h.reference("A")
    sibling: list[str] = []
    cached: list[int] = []

    def on_step(i: int) -> None:
        if i == 8:
            cached.append(len(h.pool.cached_block_hash_to_block))
            sibling.append(h.add("A"))

    name = h.lynx("A", residual=24, bits=2)
    outputs = h.run(on_step)
    same(outputs[name], reference)
    same(outputs[sibling[0]], reference)
    assert cached == [0]
    assert outputs[sibling[0]].num_cached_tokens == 0
    after = h.add("A")
    output = h.run()[after]
    same(output, reference)
    assert output.num_cached_tokens == 96


@case
def only_refined_blocks_serve_as_prefix(h: Harness) -> None:
    reference = h.reference("A", max_tokens=72)
    for params in ({}, {"logprobs": 0}):
        name = h.lynx("A", residual=40, bits=3, max_tokens=72, **params)
        h.run()
        ids = list(reference.token_ids)
        after = h.add(h.prompts["A"] + ids[:60], max_tokens=12)
        output = h.run()[after]
        assert tokens(output) == ids[60:]
        assert output.num_cached_tokens >= 128
        assert name
        h.settle()


@case
def partial_local_hit(h: Harness) -> None:
    reference = h.reference("A")
    h.save("A")
    h.add(h.prompts["A"][:70], max_tokens=1)
    h.run()
    name = h.lynx("A", bits=2)
    output = h.run()[name]
    same(output, reference)
    assert h.verified()["drafted"] > 5


# ---- interruptions


def _at(h: Harness, phase: str) -> Callable[[], bool]:
    """Whether the engine is, between two steps, in a phase of its one Lynx request."""
    scheduler = h.scheduler
    states = scheduler._verifier._states
    return {
        "loading": lambda: any(not d.drafts for d in scheduler._drafting.values()),
        "drafting": lambda: any(len(d.drafts) > 3 for d in scheduler._drafting.values()),
        "paused": lambda: any(d.paused for d in scheduler._drafting.values()),
        "between_groups": lambda: any(v.emitted for v in states.values()),
        "verified": lambda: bool(scheduler._restoring),
        "later": lambda: bool(h.events("verified")) and not scheduler._restoring,
    }[phase]


def _once(condition: Callable[[], bool], action: Callable[[], Any]) -> Callable[[int], None]:
    done: list[bool] = []

    def on_step(_: int) -> None:
        if not done and condition():
            done.append(True)
            action()

    on_step.done = done  # type: ignore[attr-defined]
    return on_step


PHASES = ("loading", "drafting", "paused", "between_groups", "verified", "later")


def _phase_params(phase: str) -> dict[str, Any]:
    params: dict[str, Any] = {"anchor": 4, "residual": 20, "max_tokens": 40}
    if phase == "paused":
        params["max_tokens"] = 6
    if phase == "between_groups":
        params["logprobs"] = 0
        params["residual"] = 30
    return params


@case
def abort_in_every_phase(h: Harness) -> None:
    for phase in PHASES:
        reference = h.reference("C")
        params = _phase_params(phase)
        drafts = list(h.reference("A", max_tokens=40).token_ids)
        name = h.lynx("A", **params)
        other = h.add("C")
        if phase == "between_groups":
            h.force(drafts)
        on_step = _once(_at(h, phase), lambda name=name: h.engine.abort_request([name]))
        outputs = h.run(on_step)
        assert on_step.done, phase
        same(outputs[other], reference)
        h.settle()


@case
def abort_with_shadows_in_flight(h: Harness) -> None:
    from vllm.v1.request import RequestStatus

    for params in ({}, {"logprobs": 0}):
        name = h.lynx("A", **params)
        schedule = type(h.scheduler).schedule
        aborted: list[str] = []

        def aborting(*args: Any, schedule: Any = schedule, aborted: Any = aborted) -> Any:
            output = schedule(h.scheduler, *args)
            states = h.scheduler._verifier._states
            if states and not aborted:
                aborted.extend(states)
                assert all(state.in_flight for state in states.values())
                h.scheduler.finish_requests(list(states), RequestStatus.FINISHED_ABORTED)
            return output

        h.scheduler.schedule = aborting
        for _ in range(40):
            h.step()
        del h.scheduler.schedule
        assert aborted
        h.engine.abort_request([name])
        h.settle()


@case
def preemption_in_every_phase(h: Harness) -> None:
    import time

    # Preempting with a step in flight needs an asynchronous runner, which v1-async does not have:
    # V1's synchronous runner would keep the dropped token of a request that was sent anew.
    last = -1 if h.flavour == "v1-async" else None
    for phase in PHASES[1:last]:
        params = _phase_params(phase)
        wanted = {k: v for k, v in params.items() if k in ("max_tokens", "logprobs")}
        reference, other_reference = h.reference("A", **wanted), h.reference("C")
        name, other = h.lynx("A", **params), h.add("C")
        if phase == "between_groups":
            h.force(list(reference.token_ids))

        def preempt(name: str = name) -> None:
            (request,) = [r for r in h.scheduler.running if r.request_id.startswith(name + "-")]
            h.scheduler.running.remove(request)
            h.scheduler._preempt_request(request, time.monotonic(), drop_stale_output=True)

        on_step = _once(_at(h, phase), preempt)
        outputs = h.run(on_step)
        assert on_step.done, phase
        same(outputs[name], reference)
        same(outputs[other], other_reference)
        states = [event["state"] for event in h.events("preempted")]
        expected = {"drafting": "drafting", "paused": "drafting", "between_groups": "verifying"}
        assert states == ([expected[phase]] if phase in expected else []), phase
        h.settle()


@case
def no_block_left(h: Harness) -> None:
    """A drafting request pauses rather than take blocks from others, and verifies what it can."""
    reference = h.reference("A", max_tokens=60)
    name = h.lynx("A", residual=60, max_tokens=60)
    held: list[Any] = []

    def on_step(i: int) -> None:
        if i == 6:
            held.extend(h.pool.get_new_blocks(h.pool.get_num_free_blocks()))
        if i == 75:
            h.pool.free_blocks(held)

    outputs = h.run(on_step)
    same(outputs[name], reference)
    assert [event["why"] for event in h.events("paused")] == ["no_room"]
    assert 20 < h.verified()["drafted"] < 32


@case
def blocks_run_out(h: Harness) -> None:
    """vLLM's own preemption for want of blocks, with Lynx requests among the victims."""
    references = {p: h.reference(p, max_tokens=72) for p in "ABCD"}
    names = {
        h.lynx("A", residual=30, max_tokens=72): "A",
        h.add("C", max_tokens=72): "C",
        h.add("D", max_tokens=72): "D",
        h.lynx("B", residual=50, max_tokens=72): "B",
    }
    held: list[Any] = []

    def on_step(i: int) -> None:
        if i == 6:
            held.extend(h.pool.get_new_blocks(h.pool.get_num_free_blocks() - 2))

    outputs = h.run(on_step)
    h.pool.free_blocks(held)
    for name, prompt in names.items():
        same(outputs[name], references[prompt])


# ---- failures


@case
def residual_lost(h: Harness) -> None:
    reference, other_reference = h.reference("A"), h.reference("C")
    for params in ({"fail": True}, {"fail_early": True}, {"fail_early": True, "anchor": 1}):
        name, other = h.lynx("A", **params), h.add("C")
        outputs = h.run()
        same(outputs[name], reference)
        same(outputs[other], other_reference)
        assert [(e["cause"], e["policy"]) for e in h.events("fallback")] == [
            ("link lost", "recompute")
        ]
        assert not h.events("verified")
        h.settle()


@case
def anchor_lost(h: Harness) -> None:
    reference = h.reference("A")
    name = h.lynx("A", lose_anchor=True)
    same(h.run()[name], reference)
    assert [event["policy"] for event in h.events("fallback")] == ["recompute"]
    assert not h.events("drafting")


@case
def residual_lost_under_policy_fail(h: Harness) -> None:
    other_reference = h.reference("C")
    h.scheduler.recompute_kv_load_failures = False
    try:
        for params in ({"fail": True}, {"fail_early": True}, {"fail_early": True, "anchor": 9}):
            name, other = h.lynx("A", **params), h.add("C")
            outputs = h.run()
            assert tokens(outputs[name]) == []
            assert outputs[name].outputs[0].finish_reason == "error"
            same(outputs[other], other_reference)
            assert [event["policy"] for event in h.events("fallback")] == ["fail"]
            h.settle()
    finally:
        h.scheduler.recompute_kv_load_failures = True


# ---- sampling parameters


def _equal(h: Harness, prompt: str, **params: Any) -> Any:
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
    _equal(h, "B", logprobs=3)
    _equal(h, "B", logprobs=0)


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
    _equal(h, "B", min_p=0.1, top_k=5)


@case
def logit_bias(h: Harness) -> None:
    _equal(h, "B", logit_bias={h.reference("B").token_ids[0]: -20.0})


@case
def allowed_token_ids(h: Harness) -> None:
    _equal(h, "B", allowed_token_ids=[3, 30, 77, 200, 300, 411])


@case
def repetition_penalty(h: Harness) -> None:
    _equal(h, "B", repetition_penalty=1.3)


@case
def output_penalties(h: Harness) -> None:
    _equal(h, "A", presence_penalty=1.0, frequency_penalty=0.6, repetition_penalty=1.1)
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
    _equal(h, "B", presence_penalty=0.7, min_tokens=12, stop_token_ids=[ids[2], ids[5]])


@case
def min_tokens(h: Harness) -> None:
    ids = h.reference("B").token_ids
    _equal(h, "B", min_tokens=8, stop_token_ids=[ids[2], ids[9]])
    _equal(h, "B", min_tokens=24, stop_token_ids=[ids[2], ids[9]])


@case
def bad_words(h: Harness) -> None:
    ids = h.reference("B").token_ids
    words = [w for w in map(h.tokenizer.decode, ids) if w.isascii() and w.strip()][:3]
    assert words
    reference = _equal(h, "B", bad_words=words)
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


# ---- structured output


def _regex(regex: str, ignore_eos: bool = False) -> dict[str, Any]:
    from vllm.sampling_params import StructuredOutputsParams

    return {"structured_outputs": StructuredOutputsParams(regex=regex), "ignore_eos": ignore_eos}


@case
def structured_output(h: Harness) -> None:
    reference = _equal(h, "B", **_regex("[a-h]{6}-([0-9]{4}|[x-z]{9})(,[p-w]{2})+"))
    assert reference.text[6] == "-"


@case
def structured_output_that_ends_before_the_drafts(h: Harness) -> None:
    """With ignore_eos a request goes on, unconstrained, behind the end of its grammar."""
    reference = _equal(h, "B", **_regex("[a-h]{6}", ignore_eos=True))
    assert len(reference.token_ids) > 20


@case
def structured_output_in_a_mixed_batch(h: Harness) -> None:
    """Masks of ordinary grammar requests survive those of the rows in the same step."""
    one, two = _regex("[a-h]{14}-[0-9]{20}"), _regex("[i-p]{12}=[q-z]{24}")
    references = h.reference("A", **one), h.reference("B", **two), h.reference("C")
    names = h.lynx("A", residual=14, **one), h.add("B", **two), h.add("C")
    outputs = h.run()
    for name, reference in zip(names, references, strict=True):
        same(outputs[name], reference)
    assert h.verified()["drafted"] > 3


# ---- metrics


@case
def metrics_count_what_was_emitted(h: Harness) -> None:
    reference = h.reference("A")
    name = h.lynx("A", residual=30, bits=8)
    output = h.run()[name]
    same(output, reference)
    assert output.metrics.num_generation_tokens == len(reference.token_ids)
    assert h.emissions[name][0] >= 29, "the first output comes with the verification"
    assert output.metrics.first_token_ts > 0


@case
def ordinary_requests_are_untouched(h: Harness) -> None:
    references = {p: h.reference(p, max_tokens=20) for p in "ABCDEF"}
    names = {h.add(p, max_tokens=20): p for p in "ABCDEF"}
    outputs = h.run()
    for name, prompt in names.items():
        same(outputs[name], references[prompt])
    assert not h.port.events
