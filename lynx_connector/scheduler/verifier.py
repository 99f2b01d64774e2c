# SPDX-License-Identifier: Apache-2.0
"""Verifies the drafts of any number of requests: sends shadows, collects what they sampled."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lynx_connector.scheduler import grammar, hooks, shadows
from lynx_connector.scheduler.states import Drafting, Verifying, VerifyPath

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput
    from vllm.v1.request import Request


@dataclass
class Verified:
    """A finished verification: what the request emits at once."""

    request: Request
    state: Verifying
    logprobs: list[LogprobsLists]  # one entry per emitted token, empty where nobody asked


class Verifier:
    """The requests between `Drafting` and ordinary decoding."""

    def __init__(self, scheduler: Scheduler, verify_rows: int, reserved_slots: int) -> None:
        """`verify_rows`: most rows of one request in one step."""
        self._scheduler = scheduler
        self._verify_rows = verify_rows
        # The V1 runner has a slot left anyway: that of the request itself, which sits out.
        self._sure_slots = reserved_slots if scheduler.use_v2_model_runner else 1
        self._opaque = hooks.keeps_shadows_opaque(scheduler)
        self._states: dict[str, Verifying] = {}
        self._logprobs: dict[str, list[LogprobsLists]] = {}
        self._names = itertools.count()

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._states

    def __len__(self) -> int:
        return len(self._states)

    def path(self, request: Request, drafting: Drafting) -> VerifyPath:
        """How this request's drafts are to be verified."""
        scheduler = self._scheduler
        facts = shadows.sampling_facts(request, opaque=self._opaque)
        decodes = scheduler.max_num_active_reqs
        fits = drafting.rows + decodes <= scheduler.max_num_scheduled_tokens
        return facts.path(
            v2_runner=scheduler.use_v2_model_runner,
            rows=drafting.rows,
            one_pass_fits=fits and hooks.can_score_prompts(scheduler),
            slots=self._sure_slots,
        )

    def start(self, request: Request, path: VerifyPath, drafting: Drafting) -> None:
        """Take over a request that is frozen at the end of its confirmed tokens."""
        state = Verifying(
            path, drafting.drafts, drafting.rows, started=time.monotonic(), life=drafting.life
        )
        self._states[request.request_id] = state
        self._logprobs[request.request_id] = []
        state.shorten(hooks.make_room(self._scheduler, request, len(state.inputs)))
        if state.rows == 1:  # no prompt logprob to ask for
            state.how = VerifyPath.ROWS

    def drop(self, request_id: str) -> Verifying | None:
        """Forget a request; results of shadows in flight are then ignored."""
        self._logprobs.pop(request_id, None)
        return self._states.pop(request_id, None)

    def tokens_wanted(self) -> int:
        """Tokens of the next step that verification would use."""
        wanted = 0
        for state in self._states.values():
            if not state.in_flight:
                most = state.rows if state.how is VerifyPath.ONE_PASS else self._verify_rows
                wanted += len(state.next_rows(most))
        return wanted

    def send(self, output: SchedulerOutput) -> None:
        """Add the next shadows, oldest request first, as far as slots and tokens go."""
        scheduler = self._scheduler
        slots = hooks.free_slots(scheduler, output)
        for request_id, state in self._states.items():
            request = scheduler.requests[request_id]
            tokens = scheduler.max_num_scheduled_tokens - output.total_num_scheduled_tokens
            if state.in_flight:
                continue
            if state.how is VerifyPath.ONE_PASS:
                rows = state.next_rows(state.rows if slots > 0 and tokens >= state.rows else 0)
                each = len(rows)
            else:
                rows = state.next_rows(min(slots, tokens, self._verify_rows))
                each = 1
            if not rows:
                continue
            new = self._shadows(request, state, rows)
            hooks.add_shadows(scheduler, output, request, new, each)
            state.sent(shadow.req_id for shadow in new)
            slots -= len(new)

    def _shadows(
        self, request: Request, state: Verifying, rows: range
    ) -> list[shadows.NewRequestData]:
        name = f"{request.request_id}#{next(self._names)}"
        blocks = self._scheduler.kv_cache_manager.get_block_ids(request.request_id)
        v2 = self._scheduler.use_v2_model_runner
        if state.how is VerifyPath.ONE_PASS:
            return [shadows.one_pass(name, request, state.inputs, blocks, v2=v2)]
        return [shadows.row(f"{name}.{i}", request, state.drafts, i, blocks, v2=v2) for i in rows]

    def add_masks(
        self, result: GrammarOutput | None, output: SchedulerOutput
    ) -> GrammarOutput | None:
        """`result`, the step's grammar masks, with those of the rows in this step."""
        scheduler = self._scheduler
        for request_id, state in self._states.items():
            request = scheduler.requests[request_id]
            if not (request.use_structured_output and _in_step(state, output)):
                continue
            if result is not None:
                result.grammar_bitmask = result.grammar_bitmask.copy()  # the buffer is reused
            rows = state.next_rows(len(state.in_flight))
            masks = grammar.row_masks(
                request, state.drafts, rows, scheduler.structured_output_manager
            )
            result = grammar.add_rows(result, state.in_flight, masks)
        return result

    def collect(self, output: SchedulerOutput, result: ModelRunnerOutput) -> list[Verified]:
        """Take in a step's samples; returns, and forgets, the requests that are done."""
        done = []
        for request_id, state in list(self._states.items()):
            if not _in_step(state, output):
                continue
            request = self._scheduler.requests[request_id]
            sent = state.in_flight
            if state.how is VerifyPath.ONE_PASS:
                samples = shadows.best_tokens(sent[0], len(state.inputs), result)
            else:
                samples = [token for one in sent for token in shadows.sample(one, result)]
            before = len(state.emitted)
            ended = state.receive(samples)
            if shadows.wants_logprobs(request.sampling_params):
                self._logprobs[request_id] += [
                    shadows.sample_logprobs(one, result)
                    for one in sent[: len(state.emitted) - before]
                ]
            if ended:
                done.append(Verified(request, state, self._logprobs[request_id]))
                self.drop(request_id)
        return done


def _in_step(state: Verifying, output: SchedulerOutput) -> bool:
    return bool(state.in_flight) and state.in_flight[0] in output.num_scheduled_tokens
