# SPDX-License-Identifier: Apache-2.0
"""What clients ask for: one function per kind, seeded, so that a case can be made again.

A case is one request, or a chat of several turns. Its answer depends on nothing but its body, so
that a single server can say beforehand what it has to be.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from tests.soak.model import ADAPTERS, MAX_MODEL_LEN, VOCABULARY

MODEL = "m"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
_SPECIAL_TOKENS = 2
_LETTERS = "etaoinshrdlucmfw"


class Compare(StrEnum):
    """What an answer is held against."""

    GREEDY = "greedy"
    """Token for token; where the reference itself nearly tied, either way."""
    SEEDED = "seeded"
    """As greedy; but how near two samples were to each other, nobody tells."""
    SHAPE = "shape"
    """As many choices as asked for, each with tokens and an end."""
    REFUSED = "refused"
    """A 400 with a cause."""


class Route(StrEnum):
    """The way of a case through the deployment."""

    ROUTER = "router"
    ORPHAN = "orphan"
    """A prefill leg that no decode leg follows."""
    TWICE = "twice"
    """Both legs by hand, the decode leg twice at once."""
    PLAIN = "plain"
    """To a decode instance, without a prefill."""


@dataclass(frozen=True)
class Case:
    """One thing that a client does."""

    kind: str
    name: str
    """Kind, seed of the run and number: enough to make it again."""
    path: str
    body: dict[str, Any]
    compare: Compare = Compare.GREEDY
    route: Route = Route.ROUTER
    turns: tuple[str, ...] = ()
    """What the user says after the first answer, and after each one that follows."""
    stream: bool = False
    choices: int = 1


@dataclass(frozen=True)
class _Draft:
    """A case without its name."""

    path: str
    body: dict[str, Any] = field(default_factory=dict)
    compare: Compare = Compare.GREEDY
    route: Route = Route.ROUTER
    turns: tuple[str, ...] = ()
    choices: int = 1
    may_stream: bool = True


Kind = Callable[[random.Random], _Draft]
KINDS: dict[str, Kind] = {}
FAILING_TODAY: dict[str, str] = {}
"""Kinds that the product does not pass, and why: left out unless asked for by name."""


def _kind(function: Kind) -> Kind:
    KINDS[function.__name__] = function
    return function


def make(kind: str, seed: int, number: int) -> Case:
    """The case of that kind with that number; equal arguments give equal cases.

    Raises:
        KeyError: there is no such kind.
    """
    rng = random.Random(f"{kind}-{seed}-{number}")
    draft = KINDS[kind](rng)
    return Case(
        kind,
        f"{kind}-{seed}-{number}",
        draft.path,
        {"model": MODEL} | draft.body,
        draft.compare,
        draft.route,
        draft.turns,
        stream=draft.may_stream and rng.random() < 0.5,
        choices=draft.choices,
    )


def pool(kinds: list[str], seed: int, size: int) -> list[Case]:
    """`size` cases, every kind about as often."""
    return [make(kinds[n % len(kinds)], seed, n // len(kinds)) for n in range(size)]


def _ids(rng: random.Random, low: int, high: int) -> list[int]:
    """A prompt of token ids, short ones oftener than long ones."""
    length = int(low * (high / low) ** rng.random())
    return [rng.randrange(_SPECIAL_TOKENS, VOCABULARY) for _ in range(length)]


def _text(rng: random.Random, low: int, high: int) -> str:
    words = int(low * (high / low) ** rng.random())
    return " ".join(
        "".join(rng.choice(_LETTERS) for _ in range(rng.randint(1, 7))) for _ in range(words)
    )


def _prompt(rng: random.Random, low: int, high: int) -> list[int] | str:
    return _ids(rng, low, high) if rng.random() < 0.5 else _text(rng, max(low // 4, 1), high // 4)


def _greedy_body(rng: random.Random, most: int = 40) -> dict[str, Any]:
    return {
        "temperature": 0,
        "max_tokens": rng.randint(1, most),
        "ignore_eos": rng.random() < 0.5,
    }


def _completion(rng: random.Random, low: int = 8, high: int = 700, **body: Any) -> dict[str, Any]:
    return _greedy_body(rng) | {"prompt": _prompt(rng, low, high)} | body


@_kind
def greedy(rng: random.Random) -> _Draft:
    """A plain completion."""
    return _Draft(COMPLETIONS, _completion(rng))


@_kind
def short(rng: random.Random) -> _Draft:
    """Prompts of 1 to 16 tokens: less than a block, less than the exact tail."""
    return _Draft(COMPLETIONS, _completion(rng, prompt=_ids(rng, 1, 16)))


@_kind
def long(rng: random.Random) -> _Draft:
    """Prompts of up to 3,000 tokens."""
    return _Draft(COMPLETIONS, _completion(rng, prompt=_ids(rng, 700, 3000)))


@_kind
def shared_prefix(rng: random.Random) -> _Draft:
    """One of four long beginnings, and an end of its own: prefix caches and reused tiers."""
    beginning = random.Random(rng.randrange(4))
    prompt = [beginning.randrange(_SPECIAL_TOKENS, VOCABULARY) for _ in range(600)]
    return _Draft(COMPLETIONS, _completion(rng, prompt=prompt + _ids(rng, 1, 200)))


@_kind
def chat(rng: random.Random) -> _Draft:
    """A chat whose every turn begins with all that was said before."""
    body = {"messages": [{"role": "user", "content": _text(rng, 5, 80)}]} | _greedy_body(rng)
    turns = tuple(_text(rng, 2, 20) for _ in range(rng.randint(0, 3)))
    return _Draft(CHAT, body, turns=turns)


@_kind
def sampled(rng: random.Random) -> _Draft:
    """Sampling that nobody can repeat."""
    return _Draft(COMPLETIONS, _completion(rng, temperature=0.8, top_p=0.9), Compare.SHAPE)


@_kind
def seeded(rng: random.Random) -> _Draft:
    """Sampling under a seed."""
    body = _completion(rng, temperature=0.9, seed=rng.randrange(1 << 30))
    return _Draft(COMPLETIONS, body, Compare.SEEDED)


@_kind
def logprobs(rng: random.Random) -> _Draft:
    """Greedy with the log probabilities of the best three."""
    return _Draft(COMPLETIONS, _completion(rng, logprobs=3))


@_kind
def penalties(rng: random.Random) -> _Draft:
    """Greedy with penalties, which forget drafts instead of verifying them on some engines."""
    body = _completion(rng, repetition_penalty=1.2)
    name = rng.choice(["presence_penalty", "frequency_penalty"])
    return _Draft(COMPLETIONS, body | {name: rng.choice([-0.5, 0.7])})


@_kind
def stop(rng: random.Random) -> _Draft:
    """Stop strings and stop tokens."""
    ends = rng.sample([a + b for a in _LETTERS[:6] for b in _LETTERS[:6]], 6)
    stop_ids = rng.sample(range(_SPECIAL_TOKENS, VOCABULARY), 40)
    extra = {"stop": ends[:4]} if rng.random() < 0.5 else {"stop_token_ids": stop_ids}
    body = _completion(rng, max_tokens=40, **extra)
    return _Draft(COMPLETIONS, body | {"include_stop_str_in_output": rng.random() < 0.5})


@_kind
def regex(rng: random.Random) -> _Draft:
    """Structured output by a regular expression."""
    pattern = rng.choice([r"[a-f]{3,12}", r"(yes|no|perhaps), [0-9]{2,8}", r"#[0-9A-F]{6}"])
    return _Draft(
        COMPLETIONS, _completion(rng, max_tokens=30, structured_outputs={"regex": pattern})
    )


@_kind
def json_schema(rng: random.Random) -> _Draft:
    """Structured output by a JSON schema."""
    schema = {
        "type": "object",
        "properties": {
            "kind": {"enum": ["lynx", "bobcat", "caracal"]},
            "wild": {"type": "boolean"},
        },
        "required": ["kind", "wild"],
        "additionalProperties": False,
    }
    return _Draft(COMPLETIONS, _completion(rng, max_tokens=60, structured_outputs={"json": schema}))


@_kind
def blocking(rng: random.Random) -> _Draft:
    """The same deployment without a speculative start."""
    return _Draft(COMPLETIONS, _completion(rng, vllm_xargs={"lynx_start": "blocking"}))


@_kind
def several(rng: random.Random) -> _Draft:
    """Several choices for one prompt."""
    choices = rng.randint(2, 4)
    body = _completion(rng, temperature=0.8, n=choices)
    return _Draft(COMPLETIONS, body, Compare.SHAPE, choices=choices)


@_kind
def prompt_list(rng: random.Random) -> _Draft:
    """Several prompts in one request."""
    prompts = [_ids(rng, 8, 300) for _ in range(rng.randint(2, 4))]
    return _Draft(COMPLETIONS, _completion(rng, prompt=prompts), choices=len(prompts))


@_kind
def lora(rng: random.Random) -> _Draft:
    """One of two adapters; servers with adapters are started where this kind is asked for."""
    return _Draft(COMPLETIONS, _completion(rng, model=rng.choice(ADAPTERS)))


@_kind
def plain(rng: random.Random) -> _Draft:
    """A request for the decode instance alone, between those with a prefill."""
    return _Draft(COMPLETIONS, _completion(rng), route=Route.PLAIN)


@_kind
def orphan(rng: random.Random) -> _Draft:
    """A prefill whose decode leg never comes: the lease has to end it."""
    body = _completion(rng)
    return _Draft(COMPLETIONS, body, Compare.SHAPE, Route.ORPHAN, may_stream=False)


@_kind
def twice(rng: random.Random) -> _Draft:
    """One handoff for two decode legs at once; both have to answer."""
    return _Draft(COMPLETIONS, _completion(rng), route=Route.TWICE, may_stream=False)


@_kind
def too_long(rng: random.Random) -> _Draft:
    """More than the model has positions for."""
    prompt = [7] * (MAX_MODEL_LEN + rng.randint(1, 100))
    return _Draft(COMPLETIONS, _completion(rng, prompt=prompt), Compare.REFUSED)


FAILING_TODAY |= {
    "lora": "vLLM's CPU kernels answer requests without an adapter wrongly beside those with one",
}


def choose(only: list[str], without: list[str]) -> list[str]:
    """Kinds by name: those of `only`, else all that pass today; less `without`.

    Raises:
        ValueError: a name that there is not, or nothing left.
    """
    unknown = [name for name in [*only, *without] if name not in KINDS]
    if unknown:
        raise ValueError(f"no kind {', '.join(unknown)}; there are {', '.join(KINDS)}")
    chosen = only or [name for name in KINDS if name not in FAILING_TODAY]
    chosen = [name for name in chosen if name not in without]
    if not chosen:
        raise ValueError("no kind is left")
    return chosen
