# SPDX-License-Identifier: Apache-2.0
"""Scheduler half of the producer: which tokens to encode when, and the reply to the router.

Pure Python; runs without torch.
"""

import logging
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lynx_connector.config import (
    DEFAULT_ANCHOR_BITS,
    EXACT_FIRST_TOKENS,
    FALLBACK_CODEC,
    FinalTier,
    LynxConfig,
)
from lynx_connector.engine.metadata import (
    EncodeChunk,
    EncodePlan,
    LynxMetadata,
    LynxWorkerMetadata,
    PrefillOutcome,
)
from lynx_connector.engine.requests import adapter_of, media_of, member
from lynx_connector.errors import ProtocolError, shown
from lynx_connector.plan.planner import Planner
from lynx_connector.plan.policy import Choice, Wanted
from lynx_connector.plan.taper import Unsent
from lynx_connector.producer.room import StagingRoom
from lynx_connector.producer.siblings import Siblings
from lynx_connector.scheduler import first_token
from lynx_connector.telemetry.events import EventLog
from lynx_connector.telemetry.failures import explain
from lynx_connector.wire.handoff import (
    TABLE_CODECS,
    Handoff,
    LynxParams,
    check_transfer_id,
    prompt_digest,
)
from lynx_connector.wire.messages import PROTOCOL_VERSION

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

    from lynx_connector.producer.bootstrap import BootstrapServer

logger = logging.getLogger("vllm.lynx.producer")


@dataclass
class _Prefill:
    """A request whose KV another instance will fetch."""

    transfer_id: str
    num_tokens: int
    prompt: str
    """Digest of its token ids."""
    adapter: str = ""
    """Its LoRA adapter's name."""
    routed_as: str | None = None
    """The router's name of the transfer, in Mooncake's shape."""
    hashes: list[bytes] = field(default_factory=list)
    """vLLM's, of its full blocks; none where their tiers need not be kept."""
    block_ids: list[int] = field(default_factory=list)
    submitted: int = 0
    """Tokens that the workers have been told to encode."""
    cached: int = 0
    """Tokens that vLLM's prefix cache had."""
    opened: bool = False
    """Whether the workers know the request, and so will report when its blocks are free."""
    plan: EncodePlan | None = None
    """Decided at the first chunk and kept through preemptions, whatever is learned meanwhile."""
    arrived: float = field(default_factory=time.monotonic)
    choice: Choice | None = None
    """What the planner said of it."""
    unsent: Unsent | None = None
    """What its streaming is behind, once it was asked for."""
    started: bool = False
    """There is room for its tiers, or it has waited for it long enough."""
    answered: bool = False
    """The router has its reply: how the prefill ends reaches the consumer with the KV."""
    sampling: str = ""
    """Digest of what its first token is sampled under; empty: it is not handed over."""


class ProducerScheduler:
    """Follows prefills that carry `do_remote_decode`, in the NIXL or in Mooncake's shape.

    Mooncake's shape needs `bootstrap`, where decode instances ask for what the reply says.
    """

    def __init__(
        self,
        config: LynxConfig,
        engine_id: str,
        host: str,
        tensor_parallel_size: int,
        block_size: int,
        events: EventLog,
        planner: Planner,
        *,
        bootstrap: "BootstrapServer | None" = None,
        v2_runner: bool = False,
        custom_logits: bool = False,
        prefix_caching: bool = True,
    ):
        """`custom_logits`: the engine has logits processors of its own, whose effect on a first
        token the decode instance cannot know. `prefix_caching`: vLLM may find blocks again."""
        self._reuses = prefix_caching and config.reuse_bytes > 0
        self._bootstrap = bootstrap
        self._v2_runner = v2_runner
        self._hands_over = config.first_token and not custom_logits
        self._config = config
        self._engine_id = engine_id
        self._host = config.advertise_host or host
        self._tp_size = tensor_parallel_size
        self._block_size = block_size
        self._events = events
        self._planner = planner
        self._ports: list[int] = []
        self._prefills: dict[str, _Prefill] = {}
        self._dropped: list[str] = []
        self._outcomes: list[PrefillOutcome] = []
        self._tables: dict[int, str] = {}
        """Digest of the newest tables of each rank that has any."""
        self._unanswered: set[str] = set()
        """Opened and not answered yet."""
        self._unwanted: set[str] = set()
        """Given up by their consumer while they run."""
        self._refused: list[str] = []
        """Prefill legs that cannot be handed over."""
        self._siblings = Siblings()
        self._room = StagingRoom(
            int(config.staging_bytes), tensor_parallel_size, config.staging_wait_seconds
        )

    def set_workers(self, ports: list[int], tables: list[str]) -> None:
        """Where the workers listen and which tables they begin with, by rank."""
        self._ports = ports
        if self._bootstrap is not None:
            self._bootstrap.set_workers([f"{self._host}:{port}" for port in ports])
        self._tables = {rank: digest for rank, digest in enumerate(tables) if digest}

    def update(self, report: LynxWorkerMetadata) -> None:
        """What the workers reported in this step."""
        self._tables.update(report.tables)
        self._planner.update(report.link_mbit, report.step_ms)
        self._unwanted |= report.unwanted & self._prefills.keys()
        self._room.dropped(report.dropped)

    def _wanted(self) -> Wanted:
        """What a request that begins now is to be encoded with."""
        codec, bits = self._config.codec, self._config.anchor_bits
        if codec in TABLE_CODECS and len(self._tables) < self._tp_size:
            codec, bits = FALLBACK_CODEC, DEFAULT_ANCHOR_BITS
        return Wanted(codec, bits, self._config.final_tier.value)

    def _decide(self, request_id: str, prefill: _Prefill) -> EncodePlan:
        """How a request that begins now is encoded: with tables once all ranks have some."""
        choice = self._planner.plan(
            request_id, self._wanted(), prefill.num_tokens, len(self._prefills)
        )
        tables: tuple[str, ...] = ()
        if choice.codec in TABLE_CODECS:
            tables = tuple(self._tables[rank] for rank in range(self._tp_size))
        prefill.choice = choice
        prefill.plan = EncodePlan(choice.codec, choice.anchor_bits, choice.final_tier, tables)
        self._events("plan", request_id, prefill.transfer_id, plan=choice.name, why=choice.why)
        return prefill.plan

    def add(self, request: "Request") -> None:
        """A new request; followed if a decode instance is to go on with it."""
        params = request.kv_transfer_params
        if params and params.get("do_remote_decode"):
            if self._siblings.add(request.request_id):
                self._prepare(request)
                return
            routed_as = params.get("transfer_id") if self._bootstrap is not None else None
            if routed_as is not None and not self._expect(request.request_id, routed_as):
                return
            self._prefills[request.request_id] = _Prefill(
                uuid.uuid4().hex,
                request.num_prompt_tokens,
                prompt_digest(request.prompt_token_ids, media_of(request)),
                adapter_of(request),
                routed_as,
                sampling=self._prepare(request),
                hashes=self._hashes(request),
            )
            self._events(
                "prefill_started",
                request.request_id,
                self._prefills[request.request_id].transfer_id,
                prompt_tokens=request.num_prompt_tokens,
            )

    def may_start(self, request: "Request") -> bool:
        """Whether a prefill may be scheduled: vLLM asks again in its next step if not."""
        prefill = self._prefills.get(request.request_id)
        if prefill is None or prefill.started:
            return True
        waited_before = self._room.num_waiting
        num_bytes = self._planner.staged_bytes(
            self._wanted(), prefill.num_tokens, EXACT_FIRST_TOKENS + self._config.exact_last_tokens
        )
        waited = self._room.admit(prefill.transfer_id, num_bytes)
        if waited is None:
            if self._room.num_waiting > waited_before:
                logger.info(
                    "lynx: request %s waits for room in staging: about %d bytes needed, %d of %d "
                    "staged (staging_bytes), %d prefills wait",
                    request.request_id,
                    num_bytes,
                    self._room.held_bytes,
                    self._config.staging_bytes,
                    self._room.num_waiting,
                )
            return False
        prefill.started = True
        self._events(
            "started", request.request_id, prefill.transfer_id, waited_seconds=round(waited, 4)
        )
        return True

    def _expect(self, request_id: str, routed_as: object) -> bool:
        """Whether a prefill leg's `transfer_id` can name its transfer."""
        assert self._bootstrap is not None
        try:
            name = check_transfer_id(routed_as)
            if self._bootstrap.expect(name):
                return True
            cause = f"transfer_id {shown(repr(name))} was used before"
        except ProtocolError as error:
            cause = str(error)
        logger.error("lynx: request %s is not handed over: %s", request_id, explain(cause))
        self._events("refused", request_id, None, cause=cause)
        self._refused.append(request_id)
        return False

    def _hashes(self, request: "Request") -> list[bytes]:
        """Hashes of the prompt's full blocks, if the engine hashes blocks of the cache's size."""
        hashes = list(request.block_hashes) if self._reuses else []
        return hashes if len(hashes) == request.num_prompt_tokens // self._block_size else []

    def _prepare(self, request: "Request") -> str:
        """Have the first token sampled as the client asked, if it can be handed over.

        Returns the digest of what it is sampled under, or an empty string.
        """
        params = request.sampling_params
        if params is None:
            return ""
        request.sampling_params = params = params.clone()
        digest = ""
        if self._hands_over and not first_token.obstacle(request, v2_runner=self._v2_runner):
            params.min_tokens = 0  # routers set 1 here, whatever the client asked for
            digest = first_token.sampling_digest(params)
        if not self._v2_runner:
            # Here a seed decides nothing: a seeded sample is thrown away. But a seeded request
            # whose prefill takes several chunks kills vLLM 0.32's CPU engine ("CPU Generator does
            # not use offset", v1/worker/gpu_model_runner.py, _bookkeeping_sync).
            params.seed = None
        return digest

    def fill(self, metadata: LynxMetadata, output: "SchedulerOutput") -> None:
        """Add this step's finished chunks, drops and preemptions to the workers' metadata."""
        self._planner.step(output.num_scheduled_tokens)
        metadata.outcomes, self._outcomes = self._outcomes, []
        if not self._prefills and not self._dropped:
            return
        for request_id in output.preempted_req_ids or ():
            if prefill := self._prefills.get(request_id):
                # What was submitted is encoded all the same, and not again when it is recomputed:
                # a consumer may have parts of it, which must not be mixed with other roundings.
                prefill.block_ids = []
                block, inside = divmod(prefill.submitted, self._block_size)
                if inside and block < len(prefill.hashes):
                    prefill.hashes[block] = b""  # encoded half before and half after
                metadata.preempted.add(request_id)
        for new in output.scheduled_new_reqs:
            if prefill := self._prefills.get(new.req_id):
                prefill.block_ids = list(new.block_ids[0])
                self._submit(metadata, output, new.req_id, prefill, new.num_computed_tokens)
        cached = output.scheduled_cached_reqs
        for index, request_id in enumerate(cached.req_ids):
            prefill = self._prefills.get(request_id)
            if prefill is None:
                continue
            new_blocks = cached.new_block_ids[index]
            if request_id in cached.resumed_req_ids:
                prefill.block_ids = []
            prefill.block_ids += new_blocks[0] if new_blocks else []
            computed = cached.num_computed_tokens[index]
            self._submit(metadata, output, request_id, prefill, computed)
        metadata.dropped, self._dropped = self._dropped, []

    def _submit(
        self,
        metadata: LynxMetadata,
        output: "SchedulerOutput",
        request_id: str,
        prefill: _Prefill,
        computed: int,
    ) -> None:
        end = min(computed + output.num_scheduled_tokens[request_id], prefill.num_tokens)
        start = prefill.submitted
        if end <= start:
            return
        plan = prefill.plan or self._decide(request_id, prefill)
        first_block, last_block = start // self._block_size, -(-end // self._block_size)
        metadata.encode.append(
            EncodeChunk(
                request_id,
                prefill.transfer_id,
                prefill.num_tokens,
                start,
                end,
                prefill.block_ids[first_block:last_block],
                plan,
                fresh=max(start, computed),
                hashes=prefill.hashes[first_block:last_block],
            )
        )
        if not prefill.opened:
            prefill.opened = True
            prefill.cached = computed
            if self._config.early_reply:
                self._unanswered.add(request_id)
        prefill.submitted = end

    def finish(self, request: "Request") -> tuple[bool, dict[str, Any] | None]:
        """A request ended: (keep its blocks until they are encoded, parameters for the reply).

        A prefill that was aborted or failed is dropped; one that ended by its length or a stop
        token is handed over, since all its prompt's KV exists. Where the router has its reply, the
        consumer hears of either.
        """
        request_id = request.request_id
        if request_id in self._siblings:
            return False, self._siblings.finish(request_id)
        prefill = self._prefills.pop(request_id, None)
        if prefill is None:
            return False, None
        self._unanswered.discard(request_id)
        self._unwanted.discard(request_id)
        if not prefill.opened:
            self._room.leave(prefill.transfer_id)
        complete = prefill.submitted >= prefill.num_tokens and _ended_normally(request)
        cause = "" if complete else f"prefill ended early ({request.status.name})"
        self._events("prefilled", request_id, prefill.transfer_id, cause=cause)
        self._events(
            "prefill_ended",
            request_id,
            prefill.transfer_id,
            outcome="complete" if complete else "dropped",
            seconds=round(time.monotonic() - prefill.arrived, 4),
            status=request.status.name,
        )
        token = _sampled(request) if complete and prefill.sampling else None
        if prefill.answered:
            self._outcomes.append(PrefillOutcome(request_id, prefill.transfer_id, token, cause))
        elif complete:
            return True, self._hand_over(request_id, prefill, token=token)
        else:
            self._dropped.append(request_id)
        if cause and self._bootstrap is not None and prefill.routed_as is not None:
            self._bootstrap.fail(prefill.routed_as, cause)
        return prefill.opened, None

    def _hand_over(
        self,
        request_id: str,
        prefill: _Prefill,
        *,
        early: bool = False,
        token: int | None = None,
    ) -> dict[str, Any]:
        plan = prefill.plan
        assert plan is not None and prefill.choice is not None  # decided with the first chunk
        self._events(
            "handoff",
            request_id,
            prefill.transfer_id,
            prompt_tokens=prefill.num_tokens,
            codec=plan.codec,
            early=early,
        )
        handoff = Handoff(
            remote_engine_id=self._engine_id,
            remote_request_id=prefill.transfer_id,
            remote_host=self._host,
            lynx=LynxParams(
                version=PROTOCOL_VERSION,
                num_tokens=prefill.num_tokens,
                codec=plan.codec,
                exact_first=EXACT_FIRST_TOKENS,
                exact_last=self._config.exact_last_tokens,
                ports=self._ports,
                anchor_bits=plan.anchor_bits,
                final_tier=FinalTier(plan.final_tier),
                tables=list(plan.tables),
                draft_limit=prefill.choice.draft_limit,
                early=early,
                prompt=prefill.prompt,
                first_token=token,
                sampling=prefill.sampling,
                adapter=prefill.adapter,
                cached_tokens=prefill.cached,
            ),
        )
        params = handoff.params()
        self._siblings.publish(request_id, params)
        if self._bootstrap is not None and prefill.routed_as is not None:
            self._bootstrap.publish(prefill.routed_as, params)
        return params

    # ---- EarlyReplyPort ---------------------------------------------------------------------

    def take_answerable(self, scheduled: Iterable[str]) -> list[str]:
        """Prefills of a finished step whose transfer every worker knows by now."""
        if not self._unanswered:
            return []
        answerable = [request_id for request_id in scheduled if request_id in self._unanswered]
        self._unanswered.difference_update(answerable)
        return answerable

    def reply_early(self, request: "Request") -> dict[str, Any] | None:
        """The reply to a prefill that goes on, where a client cannot miss anything by it."""
        prefill = self._prefills[request.request_id]
        sampling = request.sampling_params
        if (
            request.max_tokens != 1
            or request.resumable
            or member(request.request_id).child is not None  # all of them are answered at once
            or sampling is None
            or sampling.prompt_logprobs is not None
        ):
            return None
        prefill.answered = True
        return self._hand_over(request.request_id, prefill, early=True)

    def next_chunk(self, request_id: str, left: int, most: int) -> int:
        """Tokens to compute next of a prompt whose last `left` are not computed yet."""
        prefill = self._prefills.get(request_id)
        if prefill is None or prefill.choice is None or not prefill.answered:
            return most  # nothing travels before the prefill has ended, or nobody knows yet
        if prefill.unsent is None:
            prefill.unsent = Unsent(prefill.num_tokens, prefill.arrived)
        return self._planner.next_chunk(
            left, most, prefill.choice.bits, prefill.unsent, self._block_size
        )

    def take_refused(self) -> list[str]:
        """Prefill legs to end with an error."""
        refused, self._refused = self._refused, []
        return refused

    def take_unwanted(self) -> list[str]:
        """Running prefills that were answered early and given up by their consumer since."""
        unwanted = [name for name in self._unwanted if self._prefills[name].answered]
        self._unwanted.clear()
        return unwanted

    @property
    def num_staged(self) -> int:
        """Transfers that workers hold, or will."""
        return len(self._room)

    @property
    def num_prefills(self) -> int:
        """Requests followed now."""
        return len(self._prefills)


def _sampled(request: "Request") -> int | None:
    """The first token that a prefill has sampled."""
    return request.output_token_ids[0] if request.num_output_tokens else None


def _ended_normally(request: "Request") -> bool:
    # By name: importing vllm.v1.request would pull torch into this module.
    return request.status.name in ("FINISHED_LENGTH_CAPPED", "FINISHED_STOPPED")
