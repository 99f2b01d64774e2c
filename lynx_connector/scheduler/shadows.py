# SPDX-License-Identifier: Apache-2.0
"""Shadow requests: how drafts are verified without speculative decoding in the model runner.

A shadow is a `NewRequestData` that the runner sees for one step only. It shares the KV blocks of
the request that it verifies and computes its last confirmed token and the drafts again, over the
refined cache. Within a layer vLLM writes the K/V of every token of the batch before attention reads
any (vllm/model_executor/layers/attention/attention.py), so row i reads the fresh K/V of the rows
before it and its sample is the one that ordinary decoding would have taken.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
from vllm.sampling_params import SamplingParams, SamplingType
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.outputs import LogprobsLists

from lynx_connector.scheduler.states import SamplingFacts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

    BlockIds = tuple[list[int], ...]


def sampling_facts(request: Request, *, opaque: bool) -> SamplingFacts:
    """Classify a request's sampling; `opaque` adds what only the engine's configuration tells."""
    params = request.sampling_params
    reads_outputs = bool(
        params.presence_penalty
        or params.frequency_penalty
        or params.bad_words_token_ids
        or params.thinking_token_budget is not None
    )
    return SamplingFacts(
        greedy=params.sampling_type == SamplingType.GREEDY,
        shapes_logits=bool(
            params.repetition_penalty != 1.0
            or params.min_tokens
            or params.logit_bias
            or params.allowed_token_ids is not None
            or request.use_structured_output
        ),
        wants_logprobs=wants_logprobs(params),
        reads_outputs=reads_outputs,
        opaque=opaque
        or request.prompt_token_ids is None
        or request.prompt_embeds is not None
        or bool(request.mm_features)
        or params.trace_decode_token_ids is not None,
    )


def wants_logprobs(params: SamplingParams) -> bool:
    """Whether output log-probabilities go back to the client."""
    return params.num_logprobs is not None


def one_pass(
    shadow_id: str, request: Request, drafts: Sequence[int], block_ids: BlockIds, *, v2: bool
) -> NewRequestData:
    """One greedy shadow of len(drafts) + 1 tokens, from the request's last token on.

    `prompt_logprobs=1` makes the runner return the best token of every position, so the prompt's KV
    is read once for all drafts. Needs at least one draft: with none there is no prompt logprob.
    """
    tokens = [*request.all_token_ids, *drafts]
    return NewRequestData(
        req_id=shadow_id,
        prompt_token_ids=tokens,
        mm_features=[],
        sampling_params=SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1),
        pooling_params=None,
        block_ids=_copy(block_ids),
        num_computed_tokens=request.num_tokens - 1,
        lora_request=request.lora_request,
        prefill_token_ids=tokens if v2 else None,
    )


def row(
    shadow_id: str,
    request: Request,
    drafts: Sequence[int],
    index: int,
    block_ids: BlockIds,
    *,
    v2: bool,
) -> NewRequestData:
    """Row `index`: a shadow that reads one token and samples under the request's parameters.

    The V2 runner is told which of its tokens are output; the V1 runner knows a new request's tokens
    as prompt only.
    """
    tokens = [*request.all_token_ids, *drafts[:index]]
    return NewRequestData(
        req_id=shadow_id,
        prompt_token_ids=list(request.prompt_token_ids) if v2 else tokens,
        mm_features=[],
        sampling_params=row_params(
            request.sampling_params, request.num_output_tokens + index, v2=v2
        ),
        pooling_params=None,
        block_ids=_copy(block_ids),
        num_computed_tokens=len(tokens) - 1,
        lora_request=request.lora_request,
        prefill_token_ids=tokens if v2 else None,
    )


def row_params(params: SamplingParams, outputs: int, *, v2: bool) -> SamplingParams:
    """The request's sampling parameters as a row that has read `outputs` output tokens needs them.

    V2 draws noise from a hash of (seed, position, token), so rows keep the seed and meet the very
    noise of the draft in their place. V1 draws from a generator per request, where an equal seed
    would give every row equal noise: each row gets its own seed, derived from the request's.
    """
    params = params.clone()
    params.prompt_logprobs = None
    if params.extra_args:
        params.extra_args = {
            k: v for k, v in params.extra_args.items() if k != "kv_transfer_params"
        }
    if not v2:
        params.min_tokens = max(0, params.min_tokens - outputs)
        if params.seed is not None:
            digest = hashlib.blake2b(f"{params.seed}/{outputs}".encode(), digest_size=6).digest()
            params.seed = int.from_bytes(digest, "big")
    return params


def best_tokens(shadow_id: str, drafts: int, output: ModelRunnerOutput) -> list[int]:
    """The argmax of all drafts + 1 positions of a `one_pass` shadow.

    Prompt logprobs hold [given token, best token] per position; V1 returns them for the whole
    prompt, V2 for the computed positions, in both cases the drafts' positions come last.
    """
    logprobs = output.prompt_logprobs_dict[shadow_id]
    best: list[int] = logprobs.logprob_token_ids[-drafts:, 1].tolist()
    return best + sample(shadow_id, output)


def sample(shadow_id: str, output: ModelRunnerOutput) -> list[int]:
    """The token sampled by a shadow, as a list of one."""
    return list(output.sampled_token_ids[output.req_id_to_index[shadow_id]])


def sample_logprobs(shadow_id: str, output: ModelRunnerOutput) -> LogprobsLists | None:
    """The log-probabilities of a shadow's one sample."""
    if output.logprobs is None:
        return None
    return output.logprobs.slice_request(output.req_id_to_index[shadow_id], 1)


def append_logprobs(
    base: LogprobsLists, num_requests: int, parts: Sequence[Sequence[LogprobsLists]]
) -> LogprobsLists:
    """`base` of a step with `num_requests` requests, followed by one more request per part.

    A step's arrays are as wide as its most demanding request wants; rows of earlier steps are cut
    or padded to the width of this step, in which the verified request's own last row took part.
    """
    width = base.logprobs.shape[1]
    starts = list(base.cu_num_generated_tokens or range(num_requests))[:num_requests]
    ids, logprobs, ranks = [base.logprob_token_ids], [base.logprobs], [base.sampled_token_ranks]
    end = len(base.logprobs)
    for rows in parts:
        starts.append(end)
        for one in rows:
            ids.append(_fit(one.logprob_token_ids, width))
            logprobs.append(_fit(one.logprobs, width))
            ranks.append(one.sampled_token_ranks)
            end += 1
    starts.append(end)
    return LogprobsLists(
        np.concatenate(ids), np.concatenate(logprobs), np.concatenate(ranks), starts
    )


def _fit(rows: np.ndarray, width: int) -> np.ndarray:
    missing = width - rows.shape[1]
    return rows[:, :width] if missing <= 0 else np.pad(rows, ((0, 0), (0, missing)), mode="edge")


def _copy(block_ids: BlockIds) -> BlockIds:
    return tuple(list(group) for group in block_ids)
