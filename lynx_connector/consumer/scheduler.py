# SPDX-License-Identifier: Apache-2.0
"""Scheduler half of the consumer: which requests load what, and what `LynxScheduler` hears of it.

Pure Python; runs without torch. Implements `lynx_connector.scheduler.port.SpeculationPort`.
"""

import logging
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lynx_connector.config import LynxConfig
from lynx_connector.consumer.admission import Admission, OtherPromptError
from lynx_connector.consumer.bootstrap import BootstrapClient
from lynx_connector.consumer.siblings import Siblings
from lynx_connector.engine.metadata import (
    HoldRequest,
    LoadRequest,
    LynxMetadata,
    LynxWorkerMetadata,
    ReleaseRequest,
)
from lynx_connector.engine.requests import member
from lynx_connector.errors import LynxError, MalformedError, ProtocolError, shown
from lynx_connector.plan.meters import StepMeter
from lynx_connector.scheduler import first_token
from lynx_connector.telemetry.events import EventLog
from lynx_connector.telemetry.failures import explain
from lynx_connector.tiers.waiting import WaitingRoom
from lynx_connector.wire.allowed import AllowedPrefills
from lynx_connector.wire.handoff import (
    Handoff,
    parse_handoff,
    parse_mooncake_leg,
    whereabouts,
)
from lynx_connector.wire.secrets import SharedSecrets

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.request import Request

logger = logging.getLogger("vllm.lynx.consumer")


@dataclass
class _Decode:
    """A request whose KV another instance holds."""

    handoff: Handoff | None = None
    failure: str | None = None
    speculative: bool = False
    resolving: Future[dict[str, Any]] | None = None
    """The handoff, on its way from the prefill's bootstrap server."""
    asked: bool = False
    """Its handoff comes from there: the decode leg had Mooncake's shape."""
    allocated: bool = False
    """The load's blocks are allocated: the worker owns the transfer now."""
    arrived: bool = False
    """Its load has landed, or failed."""
    ended: bool = False
    """No tokens are offered any more: loaded, failed, cancelled or not needed."""
    refined_ranks: int = 0
    drafting_since: float | None = None
    params: "SamplingParams | None" = None
    """Set where the prefill's own token may be emitted."""
    first_token: int | None = None
    """That token, from when it is known until it is taken."""

    @property
    def transfer_id(self) -> str | None:
        return self.handoff.transfer_id if self.handoff else None

    @property
    def coming(self) -> bool:
        """Whether its KV is still to be here."""
        return not self.arrived and not (self.ended and not self.allocated)


class ConsumerScheduler:
    """Follows requests that carry `do_remote_prefill`, from the router to their refined cache."""

    def __init__(
        self,
        config: LynxConfig,
        speculative: bool,
        v2_runner: bool,
        recompute_on_failure: bool,
        tensor_parallel_size: int,
        block_size: int,
        events: EventLog,
        waiting_tokens: int,
    ):
        self.draft_limit = config.draft_limit
        self.verify_rows = config.verify_rows
        self._admission = Admission(
            speculative, v2_runner, config.first_token, tensor_parallel_size
        )
        self._recompute = recompute_on_failure
        self._tp_size = tensor_parallel_size
        self._block_size = block_size
        self._events = events
        self._steps = StepMeter()
        self._bootstrap = BootstrapClient(
            config.bootstrap_wait_seconds, SharedSecrets(config.secret_file)
        )
        self._allowed = AllowedPrefills(config.allowed_prefills)
        self._waiting = WaitingRoom(waiting_tokens)
        self._siblings = Siblings()
        self._orphans: list[Future[dict[str, Any]]] = []
        """Ended before their handoff was known: what the prefill holds is to be given back."""
        self._decodes: dict[str, _Decode] = {}
        self._loads: list[LoadRequest] = []
        self._cancelled: list[tuple[str, str]] = []
        self._holds: list[HoldRequest] = []
        self._releases: list[ReleaseRequest] = []
        self._started: list[str] = []
        self._refined: list[str] = []
        self._failed: list[tuple[str, str]] = []

    # ---- vLLM's hooks, forwarded by the connector --------------------------------------

    def add(self, request: "Request") -> None:
        """A new request; followed if its prefill ran elsewhere."""
        params = request.kv_transfer_params
        if not params or not params.get("do_remote_prefill"):
            return
        decode = self._decodes[request.request_id] = _Decode()
        if member(request.request_id).prompt:
            # The prefill leg's transfer is that of the first of a list of prompts.
            self._compute_beside(request.request_id, decode)
            return
        try:
            leg = parse_mooncake_leg(params)
            if leg is None:
                self._settle(request, decode, params)
            elif self._siblings.loads_itself(request.request_id, leg.transfer_id):
                self._allowed.check_url(leg.remote_bootstrap_addr)
                self._siblings.claim(request.request_id, leg.transfer_id)
                decode.resolving = self._bootstrap.resolve(leg)
                decode.asked = True
        except ProtocolError as error:
            decode.failure = str(error)

    def _settle(self, request: "Request", decode: _Decode, params: dict[str, Any]) -> None:
        """Read the handoff, wherever it came from.

        Raises:
            ProtocolError: it cannot be read, or names a host that is not allowed.
        """
        try:
            handoff = parse_handoff(params)
        except MalformedError:
            self._give_back(params, "consumer cannot read its handoff")
            raise
        self._allowed.check(handoff.remote_host)
        if not self._siblings.loads_itself(request.request_id, handoff.transfer_id):
            return
        try:
            obstacle = self._admission.obstacle(request, handoff)
        except OtherPromptError as error:
            self._release(handoff, "consumer has another prompt")
            self._compute_here(request.request_id, decode, str(error), handoff)
            return
        self._siblings.claim(request.request_id, handoff.transfer_id)
        decode.handoff = handoff
        decode.failure = obstacle
        if decode.failure is None:
            self._holds.append(
                HoldRequest(handoff.transfer_id, handoff.remote_host, handoff.lynx.ports)
            )
        decode.speculative = self._admission.starts_early(request, handoff)
        if decode.failure is None and self._admission.may_emit(request, handoff):
            decode.params = request.sampling_params

    def _compute_beside(self, request_id: str, decode: _Decode) -> None:
        """A request needs no transfer: its client's others have one."""
        decode.ended = True
        self._events("not_loaded", request_id, None, start="local")

    def _compute_here(self, request_id: str, decode: _Decode, cause: str, handoff: Handoff) -> None:
        """Nothing is lost: whatever the policy says of failed transfers."""
        decode.ended, decode.failure = True, cause
        logger.warning(
            "lynx: request %s is computed here: %s",
            request_id,
            explain(cause, handoff.remote_host),
        )
        self._events(
            "failed", request_id, handoff.transfer_id, cause=cause, peer=handoff.remote_host
        )
        self._events("not_loaded", request_id, handoff.transfer_id, start="recompute")

    def match(self, request: "Request", num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens to load beyond the local prefix cache, and whether asynchronously.

        None: not known yet; vLLM asks again in its next step, and the request holds no blocks.
        """
        decode = self._decodes.get(request.request_id)
        if decode is None or decode.ended:
            return 0, False
        if name := self._siblings.first(request.request_id):
            first = self._decodes.get(name)
            if first is not None and first.coming:
                return None, False
            self._compute_beside(request.request_id, decode)
            return 0, False
        count = _tokens_of(request, decode) - num_computed_tokens
        if count <= 1:
            # Only the last token is missing, and the first decode step computes that one anyway.
            return 0, False
        if decode.resolving is not None:
            if not self._resolved(request, decode):
                return None, False
            return self.match(request, num_computed_tokens)
        if decode.failure is not None and self._recompute:
            self._give_up(request.request_id, decode, decode.failure)
            return 0, False
        early = decode.failure is None and decode.handoff is not None and decode.handoff.lynx.early
        if early and not self._waiting.has_room(request.request_id, count):
            return None, False
        return count, True

    def _resolved(self, request: "Request", decode: _Decode) -> bool:
        """Take what the bootstrap server said, once it has."""
        assert decode.resolving is not None
        if not decode.resolving.done():
            return False
        answer, decode.resolving = decode.resolving, None
        try:
            self._settle(request, decode, answer.result())
        except LynxError as error:
            decode.failure = str(error)
        except Exception as error:  # whatever an address or a server can bring about
            cause = str(error) or type(error).__name__
            decode.failure = shown(f"prefill's bootstrap server: {cause}")
        return True

    def _give_up(self, request_id: str, decode: _Decode, cause: str) -> None:
        peer = _host(decode) or ""
        logger.warning("lynx: request %s is computed here: %s", request_id, explain(cause, peer))
        self._events("failed", request_id, decode.transfer_id, cause=cause, peer=peer)
        self._events("not_loaded", request_id, decode.transfer_id, start="recompute")
        self._finish_transfer(decode, "consumer recomputes: " + cause)

    def allocated(self, request: "Request", blocks: "KVCacheBlocks", num_external: int) -> None:
        """Blocks exist: load into them, or tell the producer that nothing is needed.

        Also called without external tokens: at a full local hit, for requests that may not read
        the cache (prompt_logprobs), and again after the load.
        """
        request_id = request.request_id
        decode = self._decodes.get(request_id)
        if decode is None or decode.ended:
            return
        if num_external == 0:
            self._finish_transfer(decode, "nothing to load")
            self._events("not_loaded", request_id, decode.transfer_id, start="local")
            return
        decode.ended = decode.allocated = True
        if decode.failure is None and decode.handoff is not None and decode.handoff.lynx.early:
            self._waiting.enter(request_id, num_external)
        num_tokens = _tokens_of(request, decode)
        first_token = num_tokens - num_external
        block_ids = blocks.get_block_ids()[0]
        first_block = first_token // self._block_size
        handoff = decode.handoff
        if handoff is not None:
            self._know_first_token(decode, handoff.lynx.first_token)
            if decode.asked:
                self._count_cached(request, handoff)
        self._loads.append(
            LoadRequest(
                request_id=request_id,
                transfer_id=handoff.transfer_id if handoff else "",
                host=handoff.remote_host if handoff else "",
                ports=handoff.lynx.ports if handoff else [],
                codec=handoff.lynx.codec if handoff else "bf16",
                exact_first=handoff.lynx.exact_first if handoff else 0,
                exact_last=handoff.lynx.exact_last if handoff else 0,
                num_tokens=num_tokens,
                first_token=first_token,
                block_ids=block_ids[first_block : -(-num_tokens // self._block_size)],
                speculative=decode.speculative,
                failure=decode.failure,
                anchor_bits=handoff.lynx.anchor_bits if handoff else 4,
                final_tier=handoff.lynx.final_tier if handoff else "residual",
                tables=handoff.lynx.tables if handoff else [],
                step_ms=self._steps.step_ms,
            )
        )
        self._events(
            "admitted",
            request_id,
            decode.transfer_id,
            prompt_tokens=num_tokens,
            local_tokens=first_token,
            start="speculative" if decode.speculative else "blocking",
        )
        if decode.speculative:
            self._started.append(request_id)

    def _count_cached(self, request: "Request", handoff: Handoff) -> None:
        """Have `cached_tokens` of the answer's usage count what the prefill found in its cache.

        vLLM reads that from the decode leg (`remote_prefill_cached_tokens`), and has read it by the
        time a leg in Mooncake's shape is resolved.
        """
        if request.prefill_stats is not None:
            request.prefill_stats.num_cached_tokens = handoff.lynx.cached_tokens

    def _know_first_token(self, decode: _Decode, token: int | None) -> None:
        if token is not None and decode.params and first_token.allowed(decode.params, token):
            decode.first_token = token

    def fill(self, metadata: LynxMetadata, scheduled: Mapping[str, int]) -> None:
        """Hand this step's loads, cancellations and releases to the workers.

        scheduled: tokens to compute by request, whose steps are timed.
        """
        self._steps.step(scheduled)
        metadata.loads, self._loads = self._loads, []
        metadata.cancelled, self._cancelled = self._cancelled, []
        for answer in [answer for answer in self._orphans if answer.done()]:
            self._orphans.remove(answer)
            self._give_back_orphan(answer)
        metadata.holds, self._holds = self._holds, []
        metadata.releases, self._releases = self._releases, []

    def _give_back_orphan(self, answer: Future[dict[str, Any]]) -> None:
        """The transfer of a request that ended before its handoff was known."""
        try:
            self._give_back(answer.result(), "request ended before its load")
        except Exception as error:
            logger.info("lynx: nothing to give back: %s", error)

    def _give_back(self, params: dict[str, Any], cause: str) -> None:
        """The transfer of a handoff that is not used, if it says enough of it."""
        where = whereabouts(params)
        if where is not None and not self._siblings.is_used(where.remote_request_id):
            self._releases.append(
                ReleaseRequest(where.remote_request_id, where.remote_host, where.lynx.ports, cause)
            )

    @property
    def has_orphans(self) -> bool:
        """Whether `fill` has to be called again though no request is left."""
        return bool(self._orphans)

    def stop(self) -> None:
        """End the thread that asks bootstrap servers."""
        self._bootstrap.stop()

    def received(self, request_ids: Iterable[str]) -> None:
        """Loads that vLLM need not wait for any more: landed, failed or cancelled."""
        for request_id in request_ids:
            self._waiting.leave(request_id)
            if decode := self._decodes.get(request_id):
                decode.arrived = True

    def update(self, report: LynxWorkerMetadata) -> None:
        """What the workers reported in this step."""
        for request_id, ranks in report.refined.items():
            decode = self._decodes.get(request_id)
            if decode is None:
                continue
            decode.refined_ranks += ranks
            if decode.refined_ranks == self._tp_size:
                self._refined.append(request_id)
        for request_id, token in report.first_tokens.items():
            if decode := self._decodes.get(request_id):
                self._know_first_token(decode, token)
        for request_id, cause in report.failed.items():
            if request_id in self._decodes:
                self._failed.append((request_id, cause))

    def finish(self, request: "Request") -> tuple[bool, dict[str, Any] | None]:
        """A request ended; whatever is still under way for it stops."""
        decode = self._decodes.pop(request.request_id, None)
        if decode is None:
            return False, None
        self._waiting.leave(request.request_id)
        self._siblings.leave(request.request_id)
        self._events(
            "finished",
            request.request_id,
            decode.transfer_id,
            output_tokens=request.num_output_tokens,
            status=request.status.name,
        )
        if decode.allocated and decode.refined_ranks < self._tp_size:
            self._cancelled.append((request.request_id, "request ended"))
        elif not decode.ended:
            self._finish_transfer(decode, "request ended before its load")
        return False, None

    def _finish_transfer(self, decode: _Decode, cause: str) -> None:
        decode.ended = True
        if decode.resolving is not None:
            self._orphans.append(decode.resolving)
            decode.resolving = None
        elif decode.handoff is not None:
            self._release(decode.handoff, cause)

    def _release(self, handoff: Handoff, cause: str) -> None:
        self._releases.append(
            ReleaseRequest(handoff.transfer_id, handoff.remote_host, handoff.lynx.ports, cause)
        )

    @property
    def num_decodes(self) -> int:
        """Requests followed now."""
        return len(self._decodes)

    # ---- SpeculationPort ------------------------------------------------------------------

    def start_blocking(self) -> None:
        """No request of this instance starts on its anchor."""
        self._admission = replace(self._admission, speculative=False)

    def take_started(self) -> list[str]:
        """Requests that will start on their anchor."""
        started, self._started = self._started, []
        return started

    def take_first_tokens(self) -> list[tuple[str, int]]:
        """(request id, token) that prefills have sampled."""
        taken = []
        for request_id, decode in self._decodes.items():
            if decode.first_token is not None:
                taken.append((request_id, decode.first_token))
                decode.first_token = None
        return taken

    def take_refined(self) -> list[str]:
        """Requests whose final tier is in place on every rank."""
        refined, self._refined = self._refined, []
        return refined

    def take_failed(self) -> list[tuple[str, str]]:
        """(request id, cause) of transfers lost after the anchor."""
        failed, self._failed = self._failed, []
        return failed

    def draft_limit_of(self, request_id: str) -> int:
        """The configured limit, or the producer's hint where that is lower."""
        decode = self._decodes.get(request_id)
        hint = decode.handoff.lynx.draft_limit if decode and decode.handoff else 0
        return min(hint, self.draft_limit) if hint else self.draft_limit

    def cancel(self, request_id: str) -> None:
        """Stop the transfer of a request that goes on without it (preempted, recomputed)."""
        decode = self._decodes.get(request_id)
        if decode is not None and decode.allocated and decode.refined_ranks < self._tp_size:
            self._cancelled.append((request_id, "cancelled by the decode instance"))

    def event(self, name: str, request_id: str, **fields: object) -> None:
        """Record a step of a request."""
        decode = self._decodes.get(request_id)
        if decode is not None and name == "drafting":
            decode.drafting_since = time.monotonic()
        if name == "verify_started":
            since = decode.drafting_since if decode else None
            seconds = 0.0 if since is None else time.monotonic() - since
            fields["drafting_seconds"] = round(seconds, 4)
        self._events(name, request_id, decode.transfer_id if decode else None, **fields)


def _tokens_of(request: "Request", decode: _Decode) -> int:
    """Prompt tokens that its prefill has computed: all, or fewer where a router appended some."""
    return decode.handoff.lynx.num_tokens if decode.handoff else request.num_prompt_tokens


def _host(decode: _Decode) -> str | None:
    return decode.handoff.remote_host if decode.handoff else None
