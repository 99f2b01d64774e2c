# SPDX-License-Identifier: Apache-2.0
"""What the scheduler half tells the workers each step, and what they report back.

Both travel inside vLLM (pickled by vLLM itself between its own processes), never to a peer. The
classes are plain, so that the scheduler halves run without torch; `connector.py` registers them
with vLLM's abstract bases.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class EncodePlan:
    """How one request is encoded, decided once at its first chunk.

    tables: digest per rank, empty for a codec without learned tables.
    """

    codec: str
    anchor_bits: int
    final_tier: str
    tables: tuple[str, ...] = ()


@dataclass(frozen=True)
class EncodeChunk:
    """Producer: tokens [start, end) of a request are computed once this step's forward is done."""

    request_id: str
    transfer_id: str
    num_tokens: int
    start: int
    end: int
    block_ids: list[int]
    """Blocks of tokens from `start // block_size * block_size` on."""
    plan: EncodePlan
    fresh: int = 0
    """First token that this step computed; those before it came from the prefix cache."""
    hashes: list[bytes] = field(default_factory=list)
    """vLLM's hashes of `block_ids`, as far as there are any: of full blocks only, and empty where
    a block's tiers must not be kept."""


@dataclass(frozen=True)
class PrefillOutcome:
    """Producer: how a prefill ended whose router had its reply before."""

    request_id: str
    transfer_id: str
    first_token: int | None
    """What it sampled, None where that is not handed over."""
    cause: str = ""
    """Why it failed; empty: it did not."""


@dataclass(frozen=True)
class LoadRequest:
    """Consumer: fetch tokens [first_token, num_tokens) into `block_ids`."""

    request_id: str
    transfer_id: str
    host: str
    ports: list[int]
    codec: str
    exact_first: int
    exact_last: int
    num_tokens: int
    first_token: int
    block_ids: list[int]
    """Blocks of tokens from `first_token // block_size * block_size` on."""
    speculative: bool
    failure: str | None = None
    """Set where the handoff itself is unusable: report the load as failed, fetch nothing."""
    anchor_bits: int = 4
    final_tier: str = "residual"
    tables: list[str] = field(default_factory=list)
    """Digest per rank, empty for a codec without learned tables."""
    step_ms: float = 0.0
    """This instance's recent decode step time; 0: not known."""


@dataclass(frozen=True)
class HoldRequest:
    """Consumer: keep a transfer's lease until it is loaded or released."""

    transfer_id: str
    host: str
    ports: list[int]


@dataclass(frozen=True)
class ReleaseRequest:
    """Consumer: tell the producer that a transfer is not needed."""

    transfer_id: str
    host: str
    ports: list[int]
    cause: str


@dataclass
class LynxMetadata:
    """Scheduler to workers, one step."""

    encode: list[EncodeChunk] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    """Producer: request ids whose staging is not wanted any more."""
    preempted: set[str] = field(default_factory=set)
    """Producer: request ids whose blocks are being taken away."""
    outcomes: list[PrefillOutcome] = field(default_factory=list)
    loads: list[LoadRequest] = field(default_factory=list)
    cancelled: list[tuple[str, str]] = field(default_factory=list)
    """Consumer: (request id, cause)."""
    holds: list[HoldRequest] = field(default_factory=list)
    releases: list[ReleaseRequest] = field(default_factory=list)


@dataclass
class LynxWorkerMetadata:
    """Workers to scheduler, one step."""

    anchored: dict[str, dict] = field(default_factory=dict)
    """Request id -> statistics of the anchor (rank that reported last)."""
    refined: dict[str, int] = field(default_factory=dict)
    """Request id -> number of ranks that have patched the final tier."""
    failed: dict[str, str] = field(default_factory=dict)
    """Request id -> cause, for transfers lost after the anchor was reported."""
    first_tokens: dict[str, int] = field(default_factory=dict)
    """Request id -> the token that its prefill sampled, where it came over the transport."""
    tables: dict[int, str] = field(default_factory=dict)
    """Producer: rank -> digest of the tables that its next requests may use."""
    link_mbit: dict[int, float] = field(default_factory=dict)
    """Producer: rank -> measured rate of its link; the slowest rank's counts."""
    step_ms: dict[int, float] = field(default_factory=dict)
    """Producer: rank -> decode step time that a decode instance named last."""
    unwanted: set[str] = field(default_factory=set)
    """Producer: request ids whose transfer was released before their prefill had ended."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Producer: transfer id -> number of ranks that hold nothing of it any more."""

    def __bool__(self) -> bool:
        """Whether there is anything to report."""
        return any(vars(self).values())

    def aggregate(self, other: "LynxWorkerMetadata") -> "LynxWorkerMetadata":
        """Combine the reports of two ranks."""
        for request_id, ranks in other.refined.items():
            self.refined[request_id] = self.refined.get(request_id, 0) + ranks
        for transfer_id, ranks in other.dropped.items():
            self.dropped[transfer_id] = self.dropped.get(transfer_id, 0) + ranks
        self.failed.update(other.failed)
        self.anchored.update(other.anchored)
        self.first_tokens.update(other.first_tokens)
        self.tables.update(other.tables)
        self.link_mbit.update(other.link_mbit)
        self.step_ms.update(other.step_ms)
        self.unwanted |= other.unwanted
        return self


@dataclass
class LynxHandshakeMetadata:
    """Producer worker to its scheduler half at start-up: where this rank listens, and the digest
    of the tables that it begins with (empty: none)."""

    port: int
    tables: str = ""
