# SPDX-License-Identifier: Apache-2.0
"""What a single plain vLLM server answers, and how an answer is held against it."""

import asyncio
import dataclasses
import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import xxhash

from tests.scheduler import tiny_llama
from tests.soak import model as soak_model
from tests.soak.client import Answer, Choice, ask, new_client
from tests.soak.kinds import CHAT, Case, Compare, Route

NEAR_TIE = 1e-3
"""Nats between the two best tokens below which two runs of one vLLM may choose differently:
batches of other sizes round differently in float32, by some 1e-5."""
LOGPROB_ERROR = 1e-2
AT_ONCE = 16


@dataclass(frozen=True)
class Turn:
    """One request of a case, with all that was said before, and what it has to bring."""

    body: dict[str, Any]
    choices: list[Choice]


class Verdict(StrEnum):
    """What became of one request."""

    EQUAL = "equal"
    NEAR_TIE = "near_tie"
    """Differs from where the reference's two best tokens were as good as equal."""
    SHAPED = "shaped"
    """Not comparable, but whole."""
    REFUSED = "refused"
    """As it has to be."""
    SEEDED_DIFFERS = "seeded_differs"
    WRONG = "wrong"
    LEFT = "left"
    """The client did not wait for it."""
    FAILED = "failed"
    NEVER = "never_ended"


GOOD = (Verdict.EQUAL, Verdict.NEAR_TIE, Verdict.SHAPED, Verdict.REFUSED, Verdict.SEEDED_DIFFERS)
"""Answered, and not known to be wrong."""


async def compute(cases: Sequence[Case], url: str) -> dict[str, list[Turn]]:
    """Answers of the plain server at `url` by the cases' names; those that nothing can be
    compared with get their bodies only.

    Raises:
        RequestError: the plain server refused one.
    """
    gate = asyncio.Semaphore(AT_ONCE)
    async with new_client(AT_ONCE) as client:

        async def turns(case: Case) -> list[Turn]:
            if case.compare not in (Compare.GREEDY, Compare.SEEDED):
                return [Turn(case.body, [])]
            body, found = case.body, []
            for text in (*case.turns, None):
                async with gate:
                    answer = await ask(client, url, case.path, body | _told_more(case))
                found.append(Turn(body, answer.choices))
                if text is not None:
                    said = {"role": "assistant", "content": answer.choices[0].text}
                    asked = {"role": "user", "content": text}
                    body = body | {"messages": [*body["messages"], said, asked]}
            return found

        answers = await asyncio.gather(*(turns(case) for case in cases))
    return dict(zip((case.name for case in cases), answers, strict=True))


def _told_more(case: Case) -> dict[str, Any]:
    # Nothing of the prefill's business goes to a plain server.
    if case.path == CHAT:
        return {"logprobs": True, "top_logprobs": 2}
    return {"logprobs": max(case.body.get("logprobs", 0), 2), "vllm_xargs": None}


def save(path: Path, cases: Sequence[Case], turns: dict[str, list[Turn]]) -> None:
    """Keep answers, so that a run with the same cases need not ask again."""
    kept = {"of": _fingerprint(cases), "turns": turns}
    path.write_text(json.dumps(kept, default=dataclasses.asdict))


def load(path: Path, cases: Sequence[Case]) -> dict[str, list[Turn]] | None:
    """What `save` kept of these very cases and this vLLM; else None."""
    kept = json.loads(path.read_text()) if path.exists() else {}
    if kept.get("of") != _fingerprint(cases):
        return None
    return {
        name: [Turn(turn["body"], [Choice(**it) for it in turn["choices"]]) for turn in turns]
        for name, turns in kept["turns"].items()
    }


def _fingerprint(cases: Sequence[Case]) -> str:
    sources = [Path(module.__file__ or "").read_text() for module in (tiny_llama, soak_model)]
    parts = repr(list(cases)), *sources, importlib.metadata.version("vllm")
    return xxhash.xxh3_128_hexdigest("\0".join(parts).encode())


def judge(case: Case, turn: Turn, answer: Answer) -> tuple[Verdict, str]:
    """The verdict on a whole answer, and where it differs."""
    if case.compare is Compare.REFUSED:
        return Verdict.WRONG, "answered, though it had to be refused"
    expected = len(turn.choices) or case.choices
    if len(answer.choices) != expected:
        return Verdict.WRONG, f"{len(answer.choices)} choices instead of {expected}"
    if case.route is Route.ORPHAN:
        return Verdict.SHAPED, ""  # a prefill that replies early has no token yet
    if case.compare is Compare.SHAPE:
        empty = [c for c in answer.choices if not c.ids and not c.text]
        return (Verdict.WRONG, "no token") if empty else (Verdict.SHAPED, "")
    worst = (Verdict.EQUAL, "")
    for index, (theirs, ours) in enumerate(zip(turn.choices, answer.choices, strict=True)):
        verdict, detail = _compare(case, theirs, ours)
        if verdict is Verdict.WRONG:
            return verdict, f"choice {index}: {detail}"
        worst = worst if verdict is Verdict.EQUAL else (verdict, detail)
    return worst


def _compare(case: Case, expected: Choice, got: Choice) -> tuple[Verdict, str]:
    # With a stop string the tokens behind it depend on how many came at once.
    with_ids = "stop" not in case.body and bool(expected.ids) and bool(got.ids)
    same = expected.text == got.text and expected.finish == got.finish
    if same and (not with_ids or expected.ids == got.ids):
        return _compare_logprobs(case, expected, got)
    at = _first_difference(expected, got, with_ids)
    gap = expected.gaps[at] if at < len(expected.gaps) else float("inf")
    detail = (
        f"token {at}, where the two best are {gap:.2g} nats apart: "
        f"expected {expected.ids} {expected.text!r} {expected.finish}, "
        f"got {got.ids} {got.text!r} {got.finish}"
    )
    if gap < NEAR_TIE:
        return Verdict.NEAR_TIE, detail
    if case.compare is Compare.SEEDED:
        return Verdict.SEEDED_DIFFERS, detail
    return Verdict.WRONG, detail


def _first_difference(expected: Choice, got: Choice, with_ids: bool) -> int:
    if not with_ids:
        # No ids to go by: the nearest call of all has to answer for it.
        gaps = expected.gaps
        return min(range(len(gaps)), key=gaps.__getitem__) if gaps else 0
    pairs = zip(expected.ids, got.ids, strict=False)
    same = min(len(expected.ids), len(got.ids))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), same)


def _compare_logprobs(case: Case, expected: Choice, got: Choice) -> tuple[Verdict, str]:
    if not case.body.get("logprobs"):
        return Verdict.EQUAL, ""
    if len(got.logprobs) != len(expected.logprobs):
        return Verdict.WRONG, f"{len(got.logprobs)} logprobs for {len(expected.logprobs)} tokens"
    pairs = zip(expected.logprobs, got.logprobs, strict=True)
    error = max((abs(a - b) for a, b in pairs), default=0.0)
    if error > LOGPROB_ERROR:
        return Verdict.WRONG, f"a log probability is {error:.3g} off"
    return Verdict.EQUAL, ""
