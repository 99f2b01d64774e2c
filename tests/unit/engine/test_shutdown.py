# SPDX-License-Identifier: Apache-2.0
"""The notice of an end wraps vLLM's own handler and changes nothing else."""

import os
import signal
import threading

import pytest

from lynx_connector.engine import shutdown
from lynx_connector.engine.shutdown import ShutdownNotice


@pytest.fixture
def heard():
    """Signals that vLLM's handler got."""
    signals = []
    before = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)}
    for one in before:
        signal.signal(one, lambda number, frame: signals.append(number))
    yield signals
    for one, handler in before.items():
        signal.signal(one, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_after_a_signal_it_serves_for_its_time(heard, monkeypatch, number):
    notice = ShutdownNotice(60)
    notice.listen()
    assert not notice.serving
    os.kill(os.getpid(), number)
    assert notice.serving and heard == [number]
    now = shutdown.time.monotonic()
    monkeypatch.setattr(shutdown.time, "monotonic", lambda: now + 59)
    assert not notice.serving


def test_without_a_timeout_nothing_is_wrapped(heard):
    handler = signal.getsignal(signal.SIGTERM)
    notice = ShutdownNotice(0)
    notice.listen()
    assert signal.getsignal(signal.SIGTERM) is handler
    os.kill(os.getpid(), signal.SIGTERM)
    assert not notice.serving and heard == [signal.SIGTERM]


def test_where_nobody_drains_the_process_just_ends():
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        ShutdownNotice(60).listen()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_beside_the_main_thread_no_handler_is_touched(heard):
    handler = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=ShutdownNotice(60).listen)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is handler
