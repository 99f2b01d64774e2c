# SPDX-License-Identifier: Apache-2.0
"""When the token that a prefill has sampled may be the first token of the decode instance's output.

Both sides ask `obstacle`, each for its own model runner. Beyond that, the two legs of a request
must have asked for the same distribution: the producer hands over a digest of what it sampled
under, which the consumer compares with its own. `min_tokens` stands apart, since routers set it on
the prefill leg: the producer samples without it, and `allowed` says what that means to a request
which has one.

Pure Python; runs without torch and vLLM.
"""

import hashlib
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.request import Request

_CHILD = re.compile(r"\d+_")
"""Ids of the n requests that vLLM makes of one with n > 1 (vllm/v1/engine/parallel_sampling.py)."""


def obstacle(request: "Request", *, v2_runner: bool) -> str | None:
    """Why a request's first token cannot come from its prefill; None if it can.

    vLLM's V1 runner draws a seeded request's tokens from one generator, which would have to move
    to the decode instance with the token. On V2 the noise is a function of seed, position and
    token, so there the first token is the one that the seed gives anywhere.
    """
    params = request.sampling_params
    if params is None:
        return "it is not a generation"
    if params.n > 1 or _CHILD.match(request.request_id):
        return "n > 1"
    if params.num_logprobs is not None:
        return "logprobs"
    if params.prompt_logprobs is not None or params.prompt_logprob_token_ids is not None:
        return "prompt_logprobs"
    if params.structured_outputs is not None:
        return "structured output"
    if params.thinking_token_budget is not None or params.trace_decode_token_ids is not None:
        return "sampling that keeps a state"
    if request.prompt_embeds is not None or request.mm_features or request.resumable:
        return "a prompt that is not text"
    if params.seed is not None and params.temperature > 0 and not v2_runner:
        return "a seed on vLLM's V1 runner"
    return None


def reads_outputs(params: "SamplingParams") -> bool:
    """Whether sampling tells output tokens from the prompt's.

    vLLM's V1 runner takes a new request's tokens for its prompt, so a first token that it has not
    sampled itself would not count as output there.
    """
    return bool(params.presence_penalty or params.frequency_penalty or params.bad_words_token_ids)


def allowed(params: "SamplingParams", token: int) -> bool:
    """Whether a token sampled without `min_tokens` is one that is sampled with it.

    Yes for the best of all tokens if it is not among those that `min_tokens` forbids. At random
    it is not: top-p and top-k then choose among other tokens.
    """
    if params.min_tokens == 0:
        return True
    return params.temperature == 0 and token not in params.all_stop_token_ids


def sampling_digest(params: "SamplingParams") -> str:
    """32 hex digits that name the distribution of a first token, `min_tokens` apart.

    Penalties on output tokens are not in it: there are none before the first.
    """
    shape = (
        params.repetition_penalty,
        sorted((params.logit_bias or {}).items()),
        sorted(params.allowed_token_ids) if params.allowed_token_ids is not None else None,
        sorted(params.bad_words_token_ids or ()),
        params.watermarking,
    )
    noise = (
        (params.temperature, params.top_p, params.top_k, params.min_p, params.seed)
        if params.temperature > 0
        else ()
    )
    return hashlib.blake2b(repr((shape, noise)).encode(), digest_size=16).hexdigest()
