# SPDX-License-Identifier: Apache-2.0
"""The tables hold what they promise, for every state and event; the documents show them."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lynx_connector.lifecycle.machine import IllegalEventError, Life
from lynx_connector.lifecycle.picture import PICTURES, mermaid
from lynx_connector.lifecycle.request import REQUEST, RequestEvent, RequestState
from lynx_connector.lifecycle.transfer import TRANSFER, WHOLE, TransferEvent, TransferState

ARCHITECTURE = Path(__file__).parents[3] / "docs" / "architecture.md"
TABLES = {
    "transfer": (TRANSFER, TransferState, TransferEvent),
    "request": (REQUEST, RequestState, RequestEvent),
}
PAIRS = [
    pytest.param(table, state, event, id=f"{name}-{state}-{event}")
    for name, (table, states, events) in TABLES.items()
    for state in states
    for event in events
]


@pytest.mark.parametrize(("table", "state", "event"), PAIRS)
def test_an_event_leads_where_its_table_says_or_raises_and_changes_nothing(table, state, event):
    life = Life(table, state)
    if event in table[state]:
        assert life.on(event) is life.state is table[state][event]
        return
    with pytest.raises(IllegalEventError, match=f"{event} in state {state}"):
        life.on(event)
    assert life.state is state


@pytest.mark.parametrize("name", TABLES)
def test_every_state_has_a_row_can_be_reached_and_can_end(name):
    table, states, events = TABLES[name]
    assert set(table) == set(states)
    assert {event for row in table.values() for event in row} == set(events)
    start = next(iter(states))
    reached = {start}
    for _ in states:
        reached |= {to for state in reached for to in table[state].values()}
    assert reached == set(states)
    ends = {state for state, row in table.items() if not row}
    assert all(Life(table, state).over == (state in ends) for state in states)
    closing = set(ends)
    for _ in states:
        closing |= {state for state, row in table.items() if closing & set(row.values())}
    assert closing == set(states)


@given(st.lists(st.sampled_from(TransferEvent)))
def test_the_lease_of_a_transfer_runs_only_when_it_is_whole(events):
    life = Life(TRANSFER, TransferState.EXPECTED)
    complete = False
    for event in events:
        try:
            life.on(event)
        except IllegalEventError:
            continue
        complete |= event is TransferEvent.COMPLETE
        assert (TransferEvent.EXPIRE in TRANSFER[life.state]) == (life.state in WHOLE)
        assert life.state not in WHOLE or complete


@given(st.lists(st.sampled_from(RequestEvent)))
def test_drafts_leave_through_verification_or_are_thrown_away(events):
    """A request with drafts gets ordinary by verification, or on a cache that is made anew."""
    life = Life(REQUEST, RequestState.WAITING)
    drafted, allowed = False, {RequestEvent.VERIFIED, RequestEvent.RECOMPUTE, RequestEvent.PREEMPT}
    for event in events:
        try:
            state = life.on(event)
        except IllegalEventError:
            continue
        drafted |= event is RequestEvent.DRAFT
        if drafted and state is RequestState.ORDINARY:
            assert event in allowed
            return


@pytest.mark.parametrize("name", TABLES)
def test_the_documents_show_the_tables(name):
    assert f"```mermaid\n{PICTURES[name]}\n```" in ARCHITECTURE.read_text()


def test_events_that_lead_the_same_way_share_an_arrow():
    ended = {RequestEvent.FAIL: RequestState.ENDED, RequestEvent.END: RequestState.ENDED}
    table = {RequestState.WAITING: ended, RequestState.ENDED: {}}
    assert mermaid(table, RequestState.WAITING).splitlines() == [
        "stateDiagram-v2",
        "  [*] --> waiting",
        "  waiting --> ended: fail, end",
        "  ended --> [*]",
    ]
