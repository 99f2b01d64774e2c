# SPDX-License-Identifier: Apache-2.0
"""The life of a transfer on the prefill side, as its worker sees it.

- Rows are encoded chunk by chunk. A decode instance may ask for them before the last one (its
  router was answered early) or after.
- Whoever has asked may ask again: ranks and retries look alike here.
- A lease runs only while a transfer is whole: before that, its prefill holds it.
- `DROP` is every early end: released by its consumer, refused, out of room, prefill failed. What
  ended stays ended.
"""

from enum import StrEnum

from lynx_connector.lifecycle.machine import Life, Transitions


class TransferState(StrEnum):
    """Where a transfer stands."""

    EXPECTED = "expected"  # rows are being encoded, nobody has asked for them
    EARLY = "early"  # sent while its prefill still runs
    STAGED = "staged"  # whole, waits for a decode instance
    SERVED = "served"  # whole, a decode instance has asked for it
    RELEASED = "released"  # its memory is given back
    EXPIRED = "expired"  # given back, because nobody came within the lease


class TransferEvent(StrEnum):
    """What happens to a transfer."""

    FETCH = "fetch"  # a decode instance asks for its tiers
    COMPLETE = "complete"  # its last row is encoded
    DROP = "drop"  # it is not wanted any more, or cannot be had
    EXPIRE = "expire"  # no contact for `lease_seconds`


_S, _E = TransferState, TransferEvent

TRANSFER: Transitions[TransferState, TransferEvent] = {
    _S.EXPECTED: {_E.FETCH: _S.EARLY, _E.COMPLETE: _S.STAGED, _E.DROP: _S.RELEASED},
    _S.EARLY: {_E.FETCH: _S.EARLY, _E.COMPLETE: _S.SERVED, _E.DROP: _S.RELEASED},
    _S.STAGED: {_E.FETCH: _S.SERVED, _E.DROP: _S.RELEASED, _E.EXPIRE: _S.EXPIRED},
    _S.SERVED: {_E.FETCH: _S.SERVED, _E.DROP: _S.RELEASED, _E.EXPIRE: _S.EXPIRED},
    _S.RELEASED: {},
    _S.EXPIRED: {},
}

WHOLE = frozenset({TransferState.STAGED, TransferState.SERVED})
"""Every row is encoded, and the lease runs."""


def transfer_life() -> Life[TransferState, TransferEvent]:
    """A transfer whose first chunk is about to be encoded."""
    return Life(TRANSFER, TransferState.EXPECTED)
