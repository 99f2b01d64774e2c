# SPDX-License-Identifier: Apache-2.0
"""What a handoff allows a request: to be loaded at all, to draft, to emit the prefill's token.

Pure Python; runs without torch.
"""

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lynx_connector.config import ONE_TIER_CODECS, StartMode
from lynx_connector.engine.requests import adapter_of, media_of, member
from lynx_connector.errors import LynxError
from lynx_connector.scheduler import first_token
from lynx_connector.wire.handoff import Handoff, prompt_digest

if TYPE_CHECKING:
    from vllm.v1.request import Request

logger = logging.getLogger("vllm.lynx.consumer")


class OtherPromptError(LynxError):
    """The prefill has computed something else than this request needs: nothing is lost by computing
    it here, whatever the failure policy says."""


@dataclass(frozen=True)
class Admission:
    """The rules of one decode instance."""

    speculative: bool
    """Requests may draft."""
    v2_runner: bool
    emits_first_token: bool
    """The prefill's token may be emitted."""
    tensor_parallel_size: int

    def obstacle(self, request: "Request", handoff: Handoff) -> str | None:
        """Why a request cannot load what its prefill has computed; None where it can.

        Raises:
            OtherPromptError: it does not need that at all.
        """
        self._check_prompt(request, handoff)
        if len(handoff.lynx.ports) != self.tensor_parallel_size:
            return (
                f"prefill at {handoff.remote_host} has tensor_parallel_size "
                f"{len(handoff.lynx.ports)}, this instance {self.tensor_parallel_size}: they must "
                "be equal"
            )
        return None

    def _check_prompt(self, request: "Request", handoff: Handoff) -> None:
        """What was prefilled must be the prompt, or its beginning: some routers append to it the
        token that the prefill has sampled."""
        adapter = adapter_of(request)
        if handoff.lynx.adapter != adapter:
            raise OtherPromptError(
                f"prefill computed with adapter {handoff.lynx.adapter or 'none'!r}, this request "
                f"asks for {adapter or 'none'!r}: serve it under one name on both sides"
            )
        there, here = handoff.lynx.num_tokens, request.num_prompt_tokens
        if there > here:
            raise OtherPromptError(
                f"prefill computed {there} prompt tokens, this instance counts {here}: both sides "
                "need the same tokenizer and chat template"
            )
        ids = request.prompt_token_ids
        theirs = handoff.lynx.prompt
        ours = prompt_digest(None if ids is None else ids[:there], media_of(request))
        if theirs and ours and theirs != ours:
            raise OtherPromptError(
                f"prefill computed another prompt of {there} tokens, this instance counts {here}: "
                "tokenizers, chat templates or clocks that differ, or one of a list of prompts"
            )
        if not (theirs and ours) and there != here:
            raise OtherPromptError(
                f"prefill computed {there} prompt tokens, this instance counts {here}, and they "
                "cannot be compared"
            )

    def starts_early(self, request: "Request", handoff: Handoff) -> bool:
        """Whether a request drafts on its anchor."""
        sampling = request.sampling_params
        start = ((sampling and sampling.extra_args) or {}).get("lynx_start")
        accepted = [mode.value for mode in StartMode]
        if start is not None and start not in accepted:
            logger.warning(
                "lynx: request %s: lynx_start = %r ignored; accepted values are %s",
                request.request_id,
                start,
                ", ".join(accepted),
            )
        seeded = sampling is not None and sampling.seed is not None and sampling.temperature > 0
        return (
            self.speculative
            # A seed promises the same answer again. vLLM's V1 runner draws from one generator per
            # request, which drafts would move on by as many tokens as the network left time for.
            and (self.v2_runner or not seeded)
            and start != StartMode.BLOCKING
            # The prompt's end is computed here, which has to be on the final cache; and of n
            # answers the others find the prompt in the prefix cache, where drafts do not go.
            and handoff.lynx.num_tokens == request.num_prompt_tokens
            and member(request.request_id).child is None
            and handoff.lynx.codec not in ONE_TIER_CODECS
        )

    def may_emit(self, request: "Request", handoff: Handoff) -> bool:
        """Whether the prefill's token is what this request's own first token would be."""
        if handoff.lynx.num_tokens != request.num_prompt_tokens:
            return False  # it is in the prompt already
        if not self.emits_first_token or first_token.obstacle(request, v2_runner=self.v2_runner):
            return False
        params = request.sampling_params
        if first_token.reads_outputs(params) and not self.v2_runner:
            return False
        return handoff.lynx.sampling == first_token.sampling_digest(params)
