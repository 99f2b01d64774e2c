# SPDX-License-Identifier: Apache-2.0
"""Early reply: a prefill is answered when it is first scheduled, and goes on.

Routers send the decode leg once the prefill leg is answered, so that only an early answer lets the
transfer overlap the prefill. vLLM's front end forgets an answered request and ignores what its
engine says of it later; how the prefill ended travels to the decode instance with its KV.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.request import RequestStatus

from lynx_connector.scheduler import hooks, startup

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler as _Base
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

    from lynx_connector.scheduler.port import EarlyReplyPort
else:
    _Base = object


class EarlyReplyMixin(_Base):
    """Overrides of `Scheduler` on a prefill instance; elsewhere it changes nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        lynx = startup.find_lynx(self.connector)
        self._replies: EarlyReplyPort | None = getattr(lynx, "early_replies", None)
        self._refused: list[Request] = []  # ended, the front end does not know yet

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        if self._replies is not None and (refused := self._replies.take_refused()):
            self._refused += self.finish_requests(refused, RequestStatus.FINISHED_ERROR)
        with hooks.token_limit(self, self._tokens_of_chunk()):
            return super().schedule(throttle_prefills)

    def _tokens_of_chunk(self) -> int:
        """Most tokens of this step: fewer at the end of a prefill that has the engine to itself, so
        that little is left to travel after it."""
        most = self.max_num_scheduled_tokens
        if self._replies is None or len(self.running) != 1 or sum(self.get_request_counts()) != 1:
            return most
        request = self.running[0]
        left = request.num_prompt_tokens - request.num_computed_tokens
        return self._replies.next_chunk(request.request_id, left, most) if left > 1 else most

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        port = self._replies
        if port is None:
            return super().update_from_output(scheduler_output, model_runner_output)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for request in self._refused:
            hooks.answer_error(outputs, request)
        self._refused = []
        for request_id in port.take_answerable(scheduler_output.num_scheduled_tokens):
            request = self.requests.get(request_id)
            if request is None or request.is_finished():
                continue  # answered already, by its end
            if (params := port.reply_early(request)) is not None:
                hooks.answer(self, outputs, request, params)
        if unwanted := port.take_unwanted():
            self.finish_requests(unwanted, RequestStatus.FINISHED_ABORTED)
        return outputs
