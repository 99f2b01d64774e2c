# SPDX-License-Identifier: Apache-2.0
"""What vLLM's requests say of themselves: what came with them in one HTTP request, which adapter
they want, what stands behind placeholders.

- A completion with a list of prompts: `cmpl-ID-0-xxxxxxxx`, `cmpl-ID-1-xxxxxxxx`
  (entrypoints/openai/completion/serving.py), each with random hex digits of its own behind it.
- n > 1: `0_PARENT`, `1_PARENT` (v1/engine/parallel_sampling.py).

All carry the `kv_transfer_params` of that one HTTP request. Pure Python.
"""

import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from vllm.v1.request import Request

_CHILD = re.compile(r"(\d+)_(.+)\Z", re.S)
_RANDOM = re.compile(r"(.+)-[0-9a-f]{8}\Z", re.S)
_LISTED = re.compile(r"(cmpl-.+)-(\d+)\Z", re.S)


class Member(NamedTuple):
    """A request's place among those that came with it.

    family: the same for all of them; prompt: which of a list; child: which of n, None without n.
    """

    family: str
    prompt: int
    child: int | None


def member(request_id: str) -> Member:
    """Read an id; one of another form is alone in its family."""
    child, rest = None, request_id
    if found := _CHILD.match(rest):
        child, rest = int(found[1]), found[2]
    if found := _RANDOM.match(rest):
        rest = found[1]
    prompt = 0
    if found := _LISTED.match(rest):
        rest, prompt = found[1], int(found[2])
    return Member(rest, prompt, child)


def is_extra(request_id: str) -> bool:
    """Whether the reply of a prefill leg never carries this request's handoff.

    vLLM's completions answer with the first prompt's, and of n with the last one's to end, for
    which the first child's has to stand in.
    """
    place = member(request_id)
    return place.prompt > 0 or bool(place.child)


def adapter_of(request: "Request") -> str:
    """Name of a request's LoRA adapter; empty: none."""
    lora = getattr(request, "lora_request", None)
    return lora.lora_name[:256] if lora is not None else ""


def media_of(request: "Request") -> list[str]:
    """vLLM's hashes of what stands behind a prompt's placeholders."""
    return [feature.identifier for feature in request.mm_features or ()]
