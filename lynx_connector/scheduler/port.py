# SPDX-License-Identifier: Apache-2.0
"""What the scheduler needs to know from a KV connector that hands over KV in tiers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from vllm.v1.request import Request


class SpeculationPort(Protocol):
    """The scheduler half of a connector, seen from `LynxScheduler` as `connector.speculation`.

    A request is *lossy* from the allocation of its asynchronous load (`take_started`) until every
    rank has patched the final tier over the anchor (`take_refined`). vLLM's own `finished_recving`
    says that the anchor has landed. Every `take_*` method returns what has come in since the last
    call and forgets it.
    """

    draft_limit: int
    """Most tokens that may be drafted for any request."""

    verify_rows: int
    """Most one-token rows that one request gets in one verification step."""

    def start_blocking(self) -> None:
        """From now on no load is lossy: each reports `finished_recving` at its final tier."""

    def take_started(self) -> list[str]:
        """Requests whose load was just allocated and reports `finished_recving` at the anchor."""

    def take_first_tokens(self) -> list[tuple[str, int]]:
        """(request id, token): what a prefill has sampled, to be emitted as the first output token
        of a request whose load is allocated. A sample of the exact model under the request's own
        parameters; it may come at any time or never, and too late it is of no use."""

    def take_refined(self) -> list[str]:
        """Requests whose final tier is now in place on all ranks."""

    def take_failed(self) -> list[tuple[str, str]]:
        """(request id, cause) of transfers lost after their load was allocated."""

    def draft_limit_of(self, request_id: str) -> int:
        """Most tokens to draft for this request, `draft_limit` or less."""

    def cancel(self, request_id: str) -> None:
        """Drop the request's transfer; idempotent.

        An anchor that has not been reported as `finished_recving` must still be reported, and
        `get_num_new_matched_tokens` must offer no tokens for this request again.
        """

    def event(self, name: str, request_id: str, **fields: object) -> None:
        """Record `name` in the request's timeline."""


class EarlyReplyPort(Protocol):
    """The producer's scheduler half, seen from `LynxScheduler` as `connector.early_replies`.

    A prefill *may be answered* from the end of its first step, when every worker knows its
    transfer, until it ends; `reply_early` is its answer and is given once.
    """

    def take_answerable(self, scheduled: Iterable[str]) -> list[str]:
        """Those of a finished step's requests that may be answered now."""

    def reply_early(self, request: Request) -> dict[str, Any] | None:
        """`kv_transfer_params` for the router while the prefill goes on; None: not this one."""

    def next_chunk(self, request_id: str, left: int, most: int) -> int:
        """Tokens to compute next of the prompt's `left` last ones, at most `most`, while no other
        request wants the engine."""

    def take_refused(self) -> list[str]:
        """Requests to end with an error: their transfer could not be told from another."""

    def take_unwanted(self) -> list[str]:
        """Running prefills that were answered early and that no decode instance waits for now."""
