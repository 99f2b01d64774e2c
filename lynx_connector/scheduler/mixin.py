# SPDX-License-Identifier: Apache-2.0
"""Speculative start as a mixin over vLLM's two schedulers.

A request whose coarse KV (the anchor) has landed decodes as any other, but its tokens are held back
as drafts. Once the exact KV is patched in, the drafts are verified by shadow requests over the same
blocks, and what the exact model would have said comes out in one piece. Requests without a lossy
load take vLLM's own path throughout.
"""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.sampling_params import SamplingType
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from lynx_connector.lifecycle.request import RequestEvent, RequestState
from lynx_connector.scheduler import grammar, hooks, startup
from lynx_connector.scheduler.early_reply import EarlyReplyMixin
from lynx_connector.scheduler.states import Drafting, PauseReason, Verifying, VerifyPath
from lynx_connector.scheduler.verifier import Verifier

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler as _Base
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

    from lynx_connector.scheduler.port import SpeculationPort
else:
    _Base = object

logger = init_logger(f"vllm.{__name__}")  # below "vllm": its handler and format


class SpeculativeStartMixin(_Base):
    """Overrides of `Scheduler`: draft, verify, fall back. `states` shows a request's life."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._asynchronous = isinstance(self, AsyncScheduler)
        startup.check_mode(self.vllm_config, asynchronous=self._asynchronous)
        port = startup.find_port(self)
        self._speculates = port is not None
        self._drafting: dict[str, Drafting] = {}
        self._restoring: set[str] = set()  # requests whose drafts the runner still takes for output
        self._filed: dict[str, int] = {}  # output tokens that the V1 runner takes for prompt
        self._handed_over: set[str] = set()  # requests that emit their prefill's token in this step
        if port is None:
            return
        self._port: SpeculationPort = port
        startup.check_supported(self.vllm_config, self.kv_cache_config)
        reserved = hooks.reserve_slots(self, port.verify_rows)
        self._vocabulary = self.vllm_config.model_config.get_vocab_size()
        self._verifier = Verifier(self, port.verify_rows, reserved)
        # V1's asynchronous runner rebuilds a request that sat out a step by itself (R1:1436).
        self._runner_restores = (
            self.scheduler_config.async_scheduling and not self.use_v2_model_runner
        )
        hooks.guard_prefix_cache(
            self, lambda request_id: request_id in self._drafting or request_id in self._verifier
        )
        logger.info(
            "Speculative start: up to %d drafts per request; %d of %d request slots are kept for "
            "verification.",
            port.draft_limit,
            reserved,
            self.max_num_running_reqs,
        )

    # ---- schedule --------------------------------------------------------------------------------

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        if not self._speculates:
            return super().schedule(throttle_prefills)
        for request_id, drafting in list(self._drafting.items()):
            self._advance(self.requests[request_id], drafting)
        decodes = len(self.running) - len(self._verifier)
        with hooks.token_reserve(self, self._verifier.tokens_wanted(), decodes):
            output = super().schedule(throttle_prefills)
        for request_id in self._port.take_started():
            if request_id in self.requests:
                self._start_drafting(self.requests[request_id])
        for request_id in self._drafting.keys() & output.num_scheduled_tokens.keys():
            self._in_step(self._drafting[request_id])
        hooks.restore(self, output, self._restoring)
        if not self.use_v2_model_runner:
            hooks.file_outputs(self, output, self._filed)
        self._verifier.send(output)
        return output

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        if not self._speculates:
            return super()._handle_blocked_waiting_request(request)
        if not hooks.adapter_fits(self, request):
            return False
        loading = hooks.waits_for_load(request)
        ready = super()._handle_blocked_waiting_request(request)
        # A lost load has given its blocks back. Passed over once, the request leaves the queue of
        # those that hold some: at its head it would keep them from running until it has new ones.
        return ready and not (loading and not self._holds_kv_blocks(request))

    def get_grammar_bitmask(self, scheduler_output: SchedulerOutput) -> GrammarOutput | None:
        result = super().get_grammar_bitmask(scheduler_output)
        return self._verifier.add_masks(result, scheduler_output) if self._speculates else result

    def _start_drafting(self, request: Request) -> None:
        params = request.sampling_params
        if self.use_v2_model_runner and params.sampling_type == SamplingType.RANDOM:
            # V2's noise is a function of seed, position and token: with one seed for drafts and
            # rows a draft is accepted far more often. Costs the fused sampler for such batches.
            hooks.set_seed(request, random.getrandbits(62))
        terminal = set(params.stop_token_ids or ())
        if params.eos_token_id is not None:
            terminal.add(params.eos_token_id)
        self._drafting[request.request_id] = Drafting.start(
            **self._bounds(request),
            terminal=terminal,
            may_draft=grammar.can_draft(request, self.structured_output_manager),
        )

    @staticmethod
    def _in_step(drafting: Drafting) -> None:
        """Once in a step, a request has its anchor: vLLM schedules no load that has not landed."""
        if drafting.life.state in (RequestState.WAITING, RequestState.FAILED):
            drafting.life.on(RequestEvent.ANCHOR)

    def _bounds(self, request: Request) -> dict[str, int]:
        return {
            "draft_limit": self._port.draft_limit_of(request.request_id),
            "max_tokens": request.max_tokens - request.num_output_tokens,
            "context_left": self.max_model_len - request.num_tokens,
        }

    def _advance(self, request: Request, drafting: Drafting) -> None:
        """Take one drafting request as far as what has come in since the last step allows."""
        running = request.status == RequestStatus.RUNNING
        if request.request_id in self.failed_recving_kv_req_ids:
            # vLLM recomputes a failed load; of a lossy one it must not keep a valid beginning.
            self._report_failure(request.request_id, "the anchor did not arrive")
            request.num_computed_tokens = 0
            drafting.fail("the anchor did not arrive")
            self._leave(request, RequestEvent.RECOMPUTE)
        elif drafting.failure is not None:
            self._fall_back(request, drafting)
        elif drafting.refined and not running:
            self._leave(request, RequestEvent.REFINE)  # nothing drafted
        elif drafting.refined:
            self._start_verifying(request, drafting)
        elif running and drafting.paused is None and not hooks.has_room(self, request):
            drafting.pause(PauseReason.NO_ROOM)
            self._pause(request, drafting)

    def _leave(self, request: Request, event: RequestEvent) -> Drafting | None:
        """Forget a request that waits or drafts; what it was, if it did."""
        drafting = self._drafting.pop(request.request_id, None)
        if drafting is not None:
            drafting.life.on(event)
        return drafting

    def _start_verifying(self, request: Request, drafting: Drafting) -> None:
        request_id = request.request_id
        path = self._verifier.path(request, drafting)
        hooks.freeze(request)
        if path is VerifyPath.REWIND and request.num_in_flight_tokens:
            return  # or the runner would feed the draft in flight instead of the prompt's end
        self._leave(request, RequestEvent.REFINE)
        self._take_back(request, drafting)
        hooks.freeze(request)
        self._port.event("verify_started", request_id, drafts=len(drafting.drafts), how=str(path))
        if path is VerifyPath.REWIND:
            request.num_computed_tokens = request.num_tokens - 1
            rewound = Verifying(path, drafting.drafts, 0, time.monotonic(), life=drafting.life)
            self._verified(request, rewound)
        else:
            self._verifier.start(request, path, drafting)

    def _take_back(self, request: Request, drafting: Drafting) -> None:
        grammar.roll_back(request, drafting.grammar_steps)
        hooks.forget_drafts(self, request, drafting.confirmed)

    # ---- update ----------------------------------------------------------------------------------

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        if not self._speculates:
            return super().update_from_output(scheduler_output, model_runner_output)
        done = self._verifier.collect(scheduler_output, model_runner_output)
        for one in done:
            self._verified(one.request, one.state)
        emitted = [(one.request, one.state.emitted, one.logprobs) for one in done]
        emitted += [(request, [token], []) for request, token in self._take_first_tokens()]
        if emitted:
            scheduler_output, model_runner_output = hooks.inject(
                scheduler_output,
                model_runner_output,
                emitted,
                asynchronous=self._asynchronous,
            )
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        self._handed_over.clear()
        for request_id in self._port.take_refined():
            if request_id in self._drafting:
                self._drafting[request_id].refined = True
        for request_id, cause in self._port.take_failed():
            if request_id in self._drafting:
                drafting = self._drafting[request_id]
                drafting.fail(cause)
                self._report_failure(request_id, cause)
                self._fall_back(self.requests[request_id], drafting)
        return outputs

    def _take_first_tokens(self) -> list[tuple[Request, int]]:
        """Tokens that prefills have sampled, of requests that still wait for their KV.

        They are emitted now, and decoding goes on behind them when the KV is here. Later there is
        nothing to gain: the request samples its first token itself.
        """
        ready = []
        for request_id, token in self._port.take_first_tokens():
            request = self.requests.get(request_id)
            if request is None or not hooks.waits_for_load(request) or request.num_output_tokens:
                continue
            if token >= self._vocabulary or hooks.keeps_shadows_opaque(self):
                continue
            if not hooks.room_for_first_token(self, request):
                continue
            self._handed_over.add(request_id)
            self._port.event("first_token", request_id, token=token)
            hooks.record_scheduled(self, request)
            ready.append((request, token))
        return ready

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], is_stale: bool = False
    ) -> tuple[list[int], bool]:
        drafting = self._drafting.get(request.request_id)
        handed_over = request.request_id in self._handed_over
        if drafting is None or handed_over:
            emitted, stopped = super()._update_request_with_output(request, new_token_ids, is_stale)
            if handed_over and not stopped:
                self._handed_over.discard(request.request_id)
                if drafting is not None:
                    drafting.confirm(**self._bounds(request))
            return emitted, stopped
        if self._asynchronous and not is_stale:
            request.num_output_placeholders -= len(new_token_ids)
        for token in new_token_ids:
            self._draft(request, drafting, token)
            if drafting.paused is not None:
                self._pause(request, drafting)
                break
        return [], False  # held back: no output, no stop

    def _draft(self, request: Request, drafting: Drafting, token: int) -> None:
        reason = drafting.append(token)
        if len(drafting.drafts) == 1:
            self._port.event("drafting", request.request_id)
        if reason is not None:
            return
        request.append_output_token_ids(token)
        if (steps := grammar.advance(request, token)) is None:
            drafting.drafts.pop()
            drafting.pause(PauseReason.GRAMMAR)
        else:
            drafting.grammar_steps += steps

    def _pause(self, request: Request, drafting: Drafting) -> None:
        hooks.freeze(request)
        self._port.event(
            "paused", request.request_id, why=str(drafting.paused), drafts=len(drafting.drafts)
        )

    def _verified(self, request: Request, state: Verifying) -> None:
        request_id = request.request_id
        state.life.on(RequestEvent.VERIFIED)
        if not self._runner_restores:
            self._restoring.add(request_id)
        ms = (time.monotonic() - state.started) * 1e3
        drafted, accepted = len(state.drafts), state.accepted
        self._port.event(
            "verified",
            request_id,
            drafted=drafted,
            accepted=accepted,
            how=str(state.how),
            steps=state.steps,
            ms=round(ms, 3),
            rejected_token=None if state.how is VerifyPath.REWIND else state.rejected_token,
        )
        logger.info(
            "Request %s: %d of %d drafts accepted (%s, %.0f ms).",
            request_id,
            accepted,
            drafted,
            state.how,
            ms,
        )

    # ---- falling back ----------------------------------------------------------------------------

    def _report_failure(self, request_id: str, cause: str) -> None:
        policy = "recompute" if self.recompute_kv_load_failures else "fail"
        self._port.event("fallback", request_id, cause=cause, policy=policy)

    def _fall_back(self, request: Request, drafting: Drafting) -> None:
        """End or recompute a request that will never be refined, as soon as its status allows."""
        if not self.recompute_kv_load_failures:
            hooks.finish_with_error(self, request)
        elif request.status == RequestStatus.RUNNING:
            self.running.remove(request)
            self._preempt_request(request, time.monotonic(), drop_stale_output=True)
        elif request.status == RequestStatus.WAITING_FOR_REMOTE_KVS:
            hooks.recompute_failed_load(self, request)
            self._port.cancel(request.request_id)
            self._leave(request, RequestEvent.RECOMPUTE)

    def _preempt_request(
        self, request: Request, timestamp: float, drop_stale_output: bool = False
    ) -> None:
        if self._speculates:
            drop_stale_output |= self._abandon(request)
        super()._preempt_request(request, timestamp, drop_stale_output)

    def _abandon(self, request: Request) -> bool:
        """Forget a preempted request's drafts: it is recomputed locally. True if there were any."""
        request_id = request.request_id
        drafting = self._leave(request, RequestEvent.PREEMPT)
        verifying = self._verifier.drop(request_id)
        if drafting is not None:
            self._take_back(request, drafting)
            self._port.cancel(request_id)
            self._port.event("preempted", request_id, state="drafting", drafts=len(drafting.drafts))
        elif verifying is not None:
            verifying.life.on(RequestEvent.PREEMPT)
            self._port.event(
                "preempted", request_id, state="verifying", drafts=len(verifying.drafts)
            )
        return drafting is not None or verifying is not None

    def _free_request(self, request: Request, delay_free_blocks: bool = False) -> Any:
        if self._speculates:
            self._leave(request, RequestEvent.END)
            if (verifying := self._verifier.drop(request.request_id)) is not None:
                verifying.life.on(RequestEvent.END)
            self._restoring.discard(request.request_id)
            self._filed.pop(request.request_id, None)
            if request.request_id in self._handed_over:
                delay_free_blocks |= hooks.end_load(self, request)
        return super()._free_request(request, delay_free_blocks)


class LynxScheduler(SpeculativeStartMixin, EarlyReplyMixin, Scheduler):
    """vLLM's synchronous scheduler: speculative start of decodes, early reply to prefills."""


class LynxAsyncScheduler(SpeculativeStartMixin, EarlyReplyMixin, AsyncScheduler):
    """vLLM's asynchronous scheduler: speculative start of decodes, early reply to prefills."""
