# SPDX-License-Identifier: Apache-2.0
"""The order on a link and the bytes in flight, simulated with a clock of our own."""

import heapq
import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lynx_connector.transport.order import PATIENCE_SECONDS, SHARE, SendOrder
from lynx_connector.transport.window import FRAME_SECONDS, MIN_FRAME_BYTES, OVERDUE_SECONDS, Window

FRAME = 1000


@dataclass(eq=False)
class Item:
    rank: int
    order: int
    left: int
    connection: int = 0
    ready: bool = True
    added: float = 0.0
    served: float | None = None


def everyone(_):
    return True


def serve(order, now, frame=FRAME, accepts=everyone):
    """Take one frame from the chosen item."""
    item = order.next(now, accepts)
    if item is None:
        return None, 0
    size = min(frame, item.left)
    item.left -= size
    item.served = now
    order.sent(size)
    if not item.left:
        order.discard(item)
    return item, size


@given(st.lists(st.tuples(st.integers(-1, 2), st.integers(1, 5000)), min_size=1, max_size=40))
def test_without_lateness_all_of_a_rank_goes_before_the_next_and_the_oldest_first(requests):
    order = SendOrder()
    for number, (rank, size) in enumerate(requests):
        order.add(Item(rank, number, size))
    served = []
    while len(order):
        served.append(serve(order, 0.0)[0])
    keys = [(item.rank, item.order) for item in served]
    assert keys == sorted(keys)


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 10_000))
def test_a_rush_of_requests_on_an_overloaded_link(seed):
    """Anchors alone are more than the link carries: nothing starves, and lateness costs the
    anchors no more than its share."""
    rng = random.Random(seed)
    order = SendOrder()
    now, rate = 0.0, 100 * FRAME  # a frame takes 10 ms
    waiting, done, aged_bytes, all_bytes = [], [], 0, 0
    number = 0
    # Each brings an anchor of 1.2 frames every 10 ms: 120 % of the link.
    for _ in range(250):  # each step looks at all that wait
        for rank in (0, 1, 2):
            item = Item(rank, number, int(1.2 * FRAME) if rank == 0 else FRAME, added=now)
            order.add(item)
            waiting.append(item)
        number += 1  # noqa: SIM113
        best = min((i for i in order if i.ready), key=lambda i: (i.rank, i.order))
        item, size = serve(order, now)
        all_bytes += size
        if item is not best:
            aged_bytes += size
            assert now - item.added >= PATIENCE_SECONDS
            # the oldest fetch of those that are late, whatever its rank
            late = [i for i in waiting if i.left and now - i.added >= PATIENCE_SECONDS]
            assert all(i.order >= item.order for i in late)
        now += size / rate * rng.uniform(0.8, 1.2)
        done.append(item)
    assert aged_bytes > 0
    assert aged_bytes <= all_bytes / SHARE + FRAME
    # After the rush, everything that is left goes.
    while len(order):
        item, size = serve(order, now)
        now += size / rate
    assert all(item.left == 0 for item in waiting)


def test_a_late_residual_under_endless_anchors_goes_within_a_bounded_time():
    order = SendOrder()
    residual = Item(1, 0, 5 * FRAME)
    order.add(residual)
    number, now, frames = 1, 0.0, 0
    while residual.left:
        if not any(i.rank == 0 for i in order):
            order.add(Item(0, number, 10 * FRAME))
            number += 1
        if now >= PATIENCE_SECONDS:
            frames += 1
        serve(order, now)
        now += 0.01
    assert frames <= 5 * SHARE
    assert now > PATIENCE_SECONDS


@pytest.mark.parametrize("share", [2, 3, 8])
def test_the_share_is_one_of_bytes_not_of_frames(share):
    """Frames are whole rows, so a little less than what was asked for, and differ by tier."""
    order = SendOrder(share=share)
    residual, anchor = Item(1, 0, 10**6), Item(0, 1, 10**8)
    order.add(residual)
    order.add(anchor)
    now, begun = 0.0, None
    while residual.left:
        if now >= PATIENCE_SECONDS and begun is None:
            begun = anchor.left
        item = order.next(now, everyone)
        size = min(item.left, 960 if item is anchor else 700)
        item.left -= size
        order.sent(size)
        now += 0.01
    assert begun is not None
    assert (begun - anchor.left) / 10**6 == pytest.approx(share - 1, rel=0.02)


def test_what_is_not_ready_or_waits_for_its_own_consumer_does_not_age():
    order = SendOrder()
    unready = Item(1, 0, FRAME, ready=False)
    blocked = Item(1, 1, FRAME, connection=7)
    anchors = Item(0, 2, 10**9)
    for item in (unready, blocked, anchors):
        order.add(item)
    now = 0.0
    while now < 2 * PATIENCE_SECONDS:
        assert serve(order, now, accepts=lambda connection: connection != 7)[0] is anchors
        now += 0.01
    unready.ready = True
    for _ in range(3 * SHARE):
        assert serve(order, now)[0] is anchors
        now += 0.001


def test_cancelled_requests_leave_at_once():
    order = SendOrder()
    items = [Item(0, number, 10 * FRAME) for number in range(3)]
    for item in items:
        order.add(item)
    assert serve(order, 0.0)[0] is items[0]
    order.discard(items[0])
    order.discard(items[0])
    assert serve(order, 0.0)[0] is items[1]
    order.discard(items[1])
    order.discard(items[2])
    assert serve(order, 0.0) == (None, 0)


# ---- window -----------------------------------------------------------------------------


class Link:
    """A link of fixed rate that delivers what it is given in order, and an endless source."""

    def __init__(self, rate, max_frame=1 << 20):
        self.rate = rate
        self.window = Window(max_frame)
        self.now = self.free_at = 0.0
        self.landing = []

    def fill(self, connection=0, dead=False):
        while self.window.has_room(self.now) and self.window.accepts(connection):
            size = self.window.frame_bytes
            flight = self.window.sent(connection, size, self.now)
            if not dead:
                self.free_at = max(self.free_at, self.now) + size / self.rate
                heapq.heappush(self.landing, (self.free_at, id(flight), flight))

    def land(self):
        self.now, _, flight = heapq.heappop(self.landing)
        self.window.landed(flight, self.now)
        return flight.num_bytes

    @property
    def backlog(self):
        """Seconds until something given now would begin to leave."""
        return max(0.0, self.free_at - self.now)


@settings(deadline=None)
@given(st.floats(1e5, 5e9), st.sampled_from([64 << 10, 1 << 20, 64 << 20]))
def test_little_is_ahead_of_a_late_frame_and_the_link_stays_busy(rate, max_frame):
    link = Link(rate, max_frame)
    for _ in range(60):
        link.fill()
        link.land()
    busy_from, sent = link.now, 0
    for _ in range(60):
        link.fill()
        assert link.backlog <= 2.3 * max(FRAME_SECONDS, MIN_FRAME_BYTES / rate)
        sent += link.land()
        assert link.landing  # one is on the link while the other is replaced
    assert sent / (link.now - busy_from) == pytest.approx(rate, rel=0.02)


def test_a_consumer_that_takes_nothing_holds_up_the_others_once():
    link = Link(12.5e6)
    for _ in range(20):
        link.fill()
        link.land()
    while link.landing:
        link.land()
    link.fill(connection="dead", dead=True)
    assert not link.window.has_room(link.now)
    link.now += OVERDUE_SECONDS + 0.01
    assert link.window.overdue("dead", link.now)
    assert link.window.has_room(link.now)
    assert not link.window.accepts("dead")
    start, sent = link.now, 0
    for _ in range(50):
        link.fill()
        sent += link.land()
    assert sent / (link.now - start) == pytest.approx(12.5e6, rel=0.02)
    link.window.forget("dead")
    assert link.window.accepts("dead")


def test_a_frame_that_lands_after_its_connection_was_forgotten_counts_nothing():
    window = Window(1 << 20)
    flight = window.sent("c", 1000, 0.0)
    window.forget("c")
    window.landed(flight, 1.0)
    assert window.rate == 0
    assert window.has_room(1.0)
