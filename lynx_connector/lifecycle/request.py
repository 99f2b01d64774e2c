# SPDX-License-Identifier: Apache-2.0
"""The life of a request on the decode side, from its load to ordinary decoding.

- Tokens that were decoded on a lossy cache are drafts. They leave only through `VERIFYING`.
- `REFINE` is acted upon between steps: with nothing decoded there is nothing to verify.
- A request whose transfer failed goes on as it is until its status allows to take it back: what it
  decodes meanwhile is drafted and thrown away.
- A preempted request loses its blocks, so that vLLM computes them anew: it is an ordinary one.
- `END` may come in any state: a client leaves, or an error is all that can be said.
"""

from enum import StrEnum

from lynx_connector.lifecycle.machine import Life, Transitions


class RequestState(StrEnum):
    """Where a request stands."""

    WAITING = "waiting"  # for its anchor; with a blocking start, for every tier
    ANCHORED = "anchored"  # scheduled on its anchor, nothing decoded yet
    DRAFTING = "drafting"
    PAUSED = "paused"  # has all the drafts that it may have
    VERIFYING = "verifying"  # its cache is refined, its drafts are being checked
    FAILED = "failed"  # its transfer is lost
    ORDINARY = "ordinary"  # vLLM's alone
    ENDED = "ended"


class RequestEvent(StrEnum):
    """What happens to a request."""

    CONFIRM = "confirm"  # the token that its prefill sampled was emitted
    ANCHOR = "anchor"  # its anchor is in the cache and it is in a step
    DRAFT = "draft"  # one token was decoded
    PAUSE = "pause"  # no further draft is wanted or possible
    REFINE = "refine"  # every tier is in the cache
    VERIFIED = "verified"
    FAIL = "fail"  # the rest of its KV will not come
    RECOMPUTE = "recompute"  # its prompt is computed here
    PREEMPT = "preempt"  # vLLM took its blocks
    END = "end"


_S, _E = RequestState, RequestEvent

_LOST = {_E.FAIL: _S.FAILED, _E.PREEMPT: _S.ORDINARY, _E.END: _S.ENDED}

REQUEST: Transitions[RequestState, RequestEvent] = {
    _S.WAITING: {
        _E.CONFIRM: _S.WAITING,
        _E.ANCHOR: _S.ANCHORED,
        _E.REFINE: _S.ORDINARY,
        **_LOST,
    },
    _S.ANCHORED: {
        _E.DRAFT: _S.DRAFTING,
        _E.PAUSE: _S.PAUSED,
        _E.REFINE: _S.VERIFYING,
        **_LOST,
    },
    _S.DRAFTING: {
        _E.DRAFT: _S.DRAFTING,
        _E.PAUSE: _S.PAUSED,
        _E.REFINE: _S.VERIFYING,
        **_LOST,
    },
    _S.PAUSED: {_E.REFINE: _S.VERIFYING, **_LOST},
    _S.VERIFYING: {_E.VERIFIED: _S.ORDINARY, _E.PREEMPT: _S.ORDINARY, _E.END: _S.ENDED},
    _S.FAILED: {
        _E.CONFIRM: _S.FAILED,
        _E.ANCHOR: _S.FAILED,
        _E.DRAFT: _S.FAILED,
        _E.PAUSE: _S.FAILED,
        _E.RECOMPUTE: _S.ORDINARY,
        **_LOST,
    },
    _S.ORDINARY: {},
    _S.ENDED: {},
}


def request_life(
    state: RequestState = RequestState.WAITING,
) -> Life[RequestState, RequestEvent]:
    """A request whose load was just allocated."""
    return Life(REQUEST, state)
