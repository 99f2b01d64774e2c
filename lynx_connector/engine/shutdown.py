# SPDX-License-Identifier: Apache-2.0
"""Knows in the engine's process that vLLM was told to end, and for how long it may still serve.

vLLM's engine drains on SIGTERM with `--shutdown-timeout`: it goes on while it has work, which a
connector can claim (`has_pending_push_work`). But it does not tell its connector that it drains, so
the signal's handler is wrapped (v1/engine/core.py, `EngineCoreProc.run_engine_core`, which has set
its own before the connector is made).
"""

import logging
import signal
import threading
import time
from types import FrameType

logger = logging.getLogger("vllm.lynx")

_SPARE_SECONDS = 2.0
"""vLLM kills the engine when its time is over: this much of it is left for a clean end."""


class ShutdownNotice:
    """When this process was told to end.

    Args:
        timeout_seconds: vLLM's `shutdown_timeout`; 0: nothing is served after the signal.
    """

    def __init__(self, timeout_seconds: float):
        self._timeout = timeout_seconds
        self._since: float | None = None

    def listen(self) -> None:
        """Notice SIGTERM and SIGINT from now on; their handlers go on to work."""
        if self._timeout and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._wrap(number)

    def _wrap(self, number: signal.Signals) -> None:
        before = signal.getsignal(number)
        if not callable(before):
            return  # nobody drains here: the process just ends

        def handler(signum: int, frame: FrameType | None) -> None:
            if self._since is None:
                self._since = time.monotonic()
            before(signum, frame)

        signal.signal(number, handler)

    @property
    def serving(self) -> bool:
        """Whether the process was told to end and may still serve what it holds."""
        return (
            self._since is not None
            and time.monotonic() - self._since < self._timeout - _SPARE_SECONDS
        )
