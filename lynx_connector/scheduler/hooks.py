# SPDX-License-Identifier: Apache-2.0
"""Every touch of vLLM's scheduler internals that Lynx needs, one function each.

Written against vLLM 0.32. In the line references S is vllm/v1/core/sched/scheduler.py, A is
vllm/v1/core/sched/async_scheduler.py, R1 and R2 are the model runners
vllm/v1/worker/gpu_model_runner.py and vllm/v1/worker/gpu/model_runner.py.
"""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.engine import EngineCoreEventType, EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.request import RequestStatus

from lynx_connector.scheduler import shadows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput
    from vllm.v1.request import Request


# ---- start-up -----------------------------------------------------------------------------------


def reserve_slots(scheduler: Scheduler, wanted: int) -> int:
    """Keep request slots of the runner free for shadows; returns how many.

    The V2 runner holds a slot per known request and asserts when it has none
    (vllm/v1/worker/gpu/states.py:99). At most a quarter of max_num_seqs is kept. Admission is
    bounded by max_num_active_reqs (S:132, S:923); max_num_running_reqs stays the slot count.
    """
    slots = scheduler.max_num_running_reqs
    reserved = min(wanted, max(1, slots // 4), slots - 1)
    scheduler.max_num_active_reqs = min(scheduler.max_num_active_reqs, slots - reserved)
    return reserved


def guard_prefix_cache(scheduler: Scheduler, is_unverified: Callable[[str], bool]) -> None:
    """Keep blocks of unverified requests out of the prefix cache.

    `coordinator.cache_blocks` is behind both caching sites: the end of an asynchronous load
    (S:3157) and every allocation (vllm/v1/core/kv_cache_manager.py:616).
    """
    coordinator = scheduler.kv_cache_manager.coordinator
    cache_blocks = coordinator.cache_blocks

    def guarded(request: Request, num_computed_tokens: int) -> None:
        if not is_unverified(request.request_id):
            cache_blocks(request, num_computed_tokens)

    coordinator.cache_blocks = guarded


def keeps_shadows_opaque(scheduler: Scheduler) -> bool:
    """Whether the engine's configuration adds per-request state that a shadow cannot carry."""
    return bool(
        scheduler.vllm_config.model_config.logits_processors
        or scheduler.return_sampling_mask
        or scheduler.aux_output_connector is not None
    )


def can_score_prompts(scheduler: Scheduler) -> bool:
    """Whether the runner can return prompt logprobs in any batch.

    With LoRA it computes logits for the rows of one request, or of all tokens (V2), under a mapping
    from rows to adapters that was made for one row a request (R1:2239, R1:5375): other shapes end
    the engine on CPU, and a wrong adapter's lm_head is silently taken on a GPU.
    """
    return scheduler.lora_config is None


# ---- one request --------------------------------------------------------------------------------


def freeze(request: Request) -> None:
    """Schedule nothing more for a running request and drop its results still in flight.

    Steps in flight become stale output in drop mode (S:2064-2072, S:2102), as for a preemption by
    reset_prefix_cache. With nothing left to compute `schedule` passes the request by (S:739).
    """
    request.spec_token_ids = []
    if request.num_in_flight_tokens:
        request.num_stale_output_tokens = request.num_in_flight_tokens
        request.drop_stale_output = True
    request.num_output_placeholders = 0
    request.num_computed_tokens = request.num_tokens


def forget_drafts(scheduler: Scheduler, request: Request, confirmed: int) -> None:
    """Cut a request back to its first `confirmed` output tokens (tokens and block hashes)."""
    left = request.num_prompt_tokens + confirmed
    del request._output_token_ids[confirmed:]
    del request._all_token_ids[left:]
    del request.block_hashes[left // scheduler.hash_block_size :]


def set_seed(request: Request, seed: int) -> None:
    """Give a request that samples without a seed an explicit one; it must not have run yet."""
    request.sampling_params = request.sampling_params.clone()
    request.sampling_params.seed = seed


def has_room(scheduler: Scheduler, request: Request) -> bool:
    """Whether a drafting request can take its next token without another request's blocks."""
    needed = request.num_tokens + request.num_output_placeholders
    short = sum(held < needed for held in _slots_held(scheduler, request))
    return short <= scheduler.kv_cache_manager.block_pool.get_num_free_blocks()


def make_room(scheduler: Scheduler, request: Request, drafts: int) -> int:
    """Allocate KV slots behind the confirmed tokens for `drafts` drafts; returns how many fit.

    Called before `Scheduler.schedule`, so that a model that zeroes new blocks does so in the very
    step that writes them (S:1563).
    """
    if not drafts or scheduler.kv_cache_manager.allocate_slots(request, drafts) is not None:
        return drafts
    return min(drafts, *(n - request.num_tokens for n in _slots_held(scheduler, request)))


def room_for_first_token(scheduler: Scheduler, request: Request) -> bool:
    """Whether a request that waits for its load can hold one token more than its prompt.

    vLLM reserves what the load needs, which for a prompt of whole blocks leaves no slot for a token
    behind it. Without one the request could not be scheduled once its KV is here: of requests that
    hold the whole cache that way none would ever run (S:1275: nobody is preempted for a waiting
    request). So the slot is taken now, where it is not promised to others.
    """
    if all(held > request.num_tokens for held in _slots_held(scheduler, request)):
        return True
    blocks = scheduler.kv_cache_manager.allocate_slots(
        request,
        1,
        delay_cache_blocks=True,  # the load is still under way
        reserved_blocks=scheduler._inflight_prefill_reserved_blocks(),
    )
    return blocks is not None


def _slots_held(scheduler: Scheduler, request: Request) -> list[int]:
    """Tokens that the request's blocks can hold, per KV cache group."""
    manager = scheduler.kv_cache_manager
    groups = manager.coordinator.single_type_managers
    block_ids = manager.get_block_ids(request.request_id)
    return [len(ids) * group.block_size for ids, group in zip(block_ids, groups, strict=True)]


def recompute_failed_load(scheduler: Scheduler, request: Request) -> None:
    """Have a request whose asynchronous load is still pending recomputed from its first token.

    The same as vLLM does for `failed_recving` (S:3341): at promotion all blocks are freed (S:3150).
    """
    request.num_computed_tokens = 0
    scheduler.failed_recving_kv_req_ids.add(request.request_id)


def finish_with_error(scheduler: Scheduler, request: Request) -> None:
    """End a request with an error output in the next `update_from_output`.

    The set is drained there into FINISHED_ERROR outputs (S:2309), whatever put a request into it.
    """
    scheduler.grammar_compile_error_reqs.add(request.request_id)


# ---- one step -----------------------------------------------------------------------------------


@contextmanager
def token_reserve(scheduler: Scheduler, tokens: int, decodes: int) -> Iterator[None]:
    """Schedule with `tokens` less, but never with less than one token for each of `decodes`."""
    saved = scheduler.max_num_scheduled_tokens
    with token_limit(scheduler, max(saved - tokens, min(saved, max(decodes, 1)))):
        yield


@contextmanager
def token_limit(scheduler: Scheduler, tokens: int) -> Iterator[None]:
    """Schedule at most `tokens`."""
    saved = scheduler.max_num_scheduled_tokens
    scheduler.max_num_scheduled_tokens = tokens
    try:
        yield
    finally:
        scheduler.max_num_scheduled_tokens = saved


def free_slots(scheduler: Scheduler, output: SchedulerOutput) -> int:
    """Request slots of the runner that this step leaves free.

    V1 needs a slot per scheduled request, V2 per known one. Shadows of the step before leave with
    this step's finished_req_ids, before new requests are added (R1:1197, R2:1146).
    """
    if scheduler._pause_state == PauseState.PAUSED_ALL:
        return 0
    if scheduler.use_v2_model_runner:
        used = len(scheduler.running) + scheduler.num_waiting_for_streaming_input
    else:
        used = len(output.num_scheduled_tokens)
    return scheduler.max_num_running_reqs - used


def adapter_fits(scheduler: Scheduler, request: Request) -> bool:
    """Whether a waiting request's LoRA adapter may join those of all running requests.

    vLLM counts the adapters that are scheduled in the step (S:890, S:942). A frozen request is not,
    but computes again later, and then all running ones must fit into a step (assert in S:897).
    """
    if not scheduler.lora_config or not request.lora_request:
        return True
    adapters = {r.lora_request.lora_int_id for r in scheduler.running if r.lora_request}
    return len(adapters | {request.lora_request.lora_int_id}) <= scheduler.lora_config.max_loras


def add_shadows(
    scheduler: Scheduler,
    output: SchedulerOutput,
    request: Request,
    new: Sequence[NewRequestData],
    tokens: int,
) -> None:
    """Append shadows of `tokens` tokens each to a step that is already scheduled.

    They are in no queue; their ids go into the next step's finished_req_ids, which makes the runner
    drop them. `request` is fenced like a scheduled one (S:1616), and a step that holds nothing else
    is counted, as `update_from_output` counts it (S:1536, S:2050).
    """
    if scheduler.defer_block_free:
        if output.total_num_scheduled_tokens == 0:
            scheduler.sched_step_seq += 1
        request.last_sched_seq = scheduler.sched_step_seq
    for shadow in new:
        output.scheduled_new_reqs.append(shadow)
        output.num_scheduled_tokens[shadow.req_id] = tokens
        output.total_num_scheduled_tokens += tokens
        scheduler.finished_req_ids.add(shadow.req_id)
    output.has_structured_output_requests |= request.use_structured_output


def restore(scheduler: Scheduler, output: SchedulerOutput, waiting: set[str]) -> None:
    """Tell the runner the true tokens of requests that it knows with drafts as output.

    Done where such a request is scheduled next; its id then leaves `waiting`.
    - V2 ignores a lowered num_computed_tokens (R2:1236); a new request of the same id replaces the
      old one (R2:1165).
    - V1 takes the update of a streaming session (R1:1250, R1:1591), see `file_outputs`.
    A preempted request on V2 is sent anew by vLLM itself (S:1425).
    """
    waiting.difference_update(new.req_id for new in output.scheduled_new_reqs)
    cached = output.scheduled_cached_reqs
    for request_id in [rid for rid in cached.req_ids if rid in waiting]:
        waiting.remove(request_id)
        at = cached.req_ids.index(request_id)
        computed = cached.num_computed_tokens[at]
        for column in (
            cached.req_ids,
            cached.new_block_ids,
            cached.num_computed_tokens,
            cached.num_output_tokens,
        ):
            column.pop(at)
        cached.all_token_ids.pop(request_id, None)
        cached.resumed_req_ids.discard(request_id)

        request = scheduler.requests[request_id]
        tokens = list(request.all_token_ids)
        blocks = scheduler.kv_cache_manager.get_block_ids(request_id)
        new = NewRequestData.from_request(
            request,
            blocks,
            tokens if scheduler.use_v2_model_runner else None,
            uses_mrope=scheduler.model_uses_mrope,
        )
        new.num_computed_tokens = computed
        output.scheduled_new_reqs.append(new)


def file_outputs(scheduler: Scheduler, output: SchedulerOutput, filed: dict[str, int]) -> None:
    """Have the V1 runner take output tokens of requests that are new to it for prompt.

    It knows no output of a new request (R1:1290), so its copy of the prompt holds all tokens;
    parameters that would notice never get here with tokens emitted (`SamplingFacts.path`,
    `first_token.reads_outputs`), but for min_tokens, which is lowered. `filed` remembers how many
    there are per request: by so many the counts in later steps are too high for it (R1:1405,
    R1:1435).
    """
    for new in output.scheduled_new_reqs:
        request = scheduler.requests[new.req_id]
        filed.pop(new.req_id, None)
        if request.num_output_tokens:
            filed[new.req_id] = request.num_output_tokens
            new.prompt_token_ids = list(request.all_token_ids)
            new.sampling_params = request.sampling_params.clone()
            new.sampling_params.min_tokens = max(
                0, request.sampling_params.min_tokens - request.num_output_tokens
            )
    counts = output.scheduled_cached_reqs.num_output_tokens
    for at, request_id in enumerate(output.scheduled_cached_reqs.req_ids):
        counts[at] -= filed.get(request_id, 0)


def waits_for_load(request: Request) -> bool:
    """Whether a request's asynchronous load is allocated and it has not run since."""
    return request.status == RequestStatus.WAITING_FOR_REMOTE_KVS


def end_load(scheduler: Scheduler, request: Request) -> bool:
    """A request ends before it was promoted; True if its blocks must wait for its load to end.

    As `finish_requests` does for such a request (S:2669).
    """
    pending = request.request_id not in scheduler.finished_recving_kv_req_ids
    scheduler.finished_recving_kv_req_ids.discard(request.request_id)
    scheduler.failed_recving_kv_req_ids.discard(request.request_id)
    return pending


def record_scheduled(scheduler: Scheduler, request: Request) -> None:
    """Tell vLLM's metrics that a request is served from now on.

    It does so itself when it first schedules tokens, for a handed over token too late: queue time
    ends there and prefill time begins (v1/metrics/stats.py:597).
    """
    if scheduler.log_stats:
        request.record_event(EngineCoreEventType.SCHEDULED)


def inject(
    output: SchedulerOutput,
    result: ModelRunnerOutput,
    emitted: Sequence[tuple[Request, list[int], list[LogprobsLists]]],
    *,
    asynchronous: bool,
) -> tuple[SchedulerOutput, ModelRunnerOutput]:
    """Copies of a step and its result in which each request produced its emitted tokens.

    vLLM then appends, stops, finishes and reports them as if they had been sampled in this step
    (S:2062-2290). A request ends up with one token to compute: the last emitted one; where its load
    is under way, so it does once that has ended.
    """
    scheduled = dict(output.num_scheduled_tokens)
    index = dict(result.req_id_to_index)
    sampled = list(result.sampled_token_ids)
    for request, tokens, _ in emitted:
        if not waits_for_load(request):
            request.num_computed_tokens = request.num_tokens + len(tokens) - 1
        request.num_in_flight_tokens += 1  # taken off again with the token scheduled here
        request.num_output_placeholders = len(tokens) if asynchronous else 0  # A:71
        scheduled[request.request_id] = 1
        index[request.request_id] = len(sampled)
        sampled.append(list(tokens))
    logprobs = result.logprobs
    if logprobs is not None:
        logprobs = shadows.append_logprobs(
            logprobs, len(result.sampled_token_ids), [rows for _, _, rows in emitted]
        )
    return (
        dataclasses.replace(output, num_scheduled_tokens=scheduled),
        dataclasses.replace(
            result, req_id_to_index=index, sampled_token_ids=sampled, logprobs=logprobs
        ),
    )


def answer(
    scheduler: Scheduler,
    outputs: dict[int, EngineCoreOutputs],
    request: Request,
    kv_transfer_params: dict[str, Any],
) -> None:
    """Add the final output of a request that goes on running, with no token.

    The front end closes the request with it, and passes over later outputs of an id that it does
    not know (vllm/v1/engine/output_processor.py:714). Statistics are handed out once, as with a
    first token (S:2207).
    """
    stats = request.take_prefill_stats()
    if stats is not None:
        stats.finalize(scheduler.kv_cache_manager.estimate_cached_tokens(request))
        kv_transfer_params["remote_prefill_cached_tokens"] = stats.num_cached_tokens  # S:2239
    output = EngineCoreOutput(
        request_id=request.request_id,
        new_token_ids=[],
        finish_reason=FinishReason.LENGTH,
        events=request.take_events(),
        kv_transfer_params=kv_transfer_params,
        trace_headers=request.trace_headers,
        prefill_stats=stats,
    )
    outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(output)


def answer_error(outputs: dict[int, EngineCoreOutputs], request: Request) -> None:
    """Add the error output of a request that was ended outside a step (as S:2309 does)."""
    output = EngineCoreOutput(
        request_id=request.request_id,
        new_token_ids=[],
        finish_reason=request.get_finished_reason(),
        events=request.take_events(),
        trace_headers=request.trace_headers,
    )
    outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(output)
