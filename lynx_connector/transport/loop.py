# SPDX-License-Identifier: Apache-2.0
"""One thread with one asyncio loop and one UCX context for all that this worker sends or receives.

UCX progresses in a thread of its own that sleeps in epoll, and completions reach the loop as
futures: an idle worker costs about 2 % of a core (`ucxx`'s other modes poll).
"""

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

START_TIMEOUT_SECONDS = 30.0


class TransportLoop:
    """Runs coroutines in the transport thread. Start once, stop once."""

    def __init__(self, ucx_tls: str | None = None, data_ports: str | None = None):
        wanted = {"TLS": ucx_tls, "TCP_PORT_RANGE": data_ports, "RNDV_THRESH": _rendezvous()}
        self._options = {
            name: value
            for name, value in wanted.items()
            if value is not None and f"UCX_{name}" not in os.environ
        }
        self._started: Future[asyncio.AbstractEventLoop] = Future()
        self._thread = threading.Thread(target=self._main, name="lynx-transport", daemon=True)

    def start(self) -> None:
        """Start the thread and wait until UCX is up.

        Raises:
            Exception: whatever UCX raised while it started.
        """
        self._thread.start()
        self._loop = self._started.result(START_TIMEOUT_SECONDS)

    def _main(self) -> None:
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        try:
            loop.run_until_complete(self._init_ucx())
        except BaseException as error:
            self._started.set_exception(error)
            return
        self._started.set_result(loop)
        loop.run_forever()

    async def _init_ucx(self) -> None:
        os.environ.setdefault("UCX_WARN_UNUSED_ENV_VARS", "n")
        import ucxx

        ucxx.init(options=self._options, progress_mode="thread", enable_python_future=True)

    def run(self, coroutine: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """Run a coroutine in the loop and wait for its result (never from the loop itself)."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout)

    def post(self, function: Callable[..., object], *args: Any) -> None:
        """Call a plain function in the loop soon, without waiting."""
        self._loop.call_soon_threadsafe(function, *args)

    def stop(self) -> None:
        """Cancel what runs in the loop, then end the thread."""
        if not self._thread.is_alive():
            return
        try:
            self.run(_cancel_all(), timeout=5.0)
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(timeout=5.0)


def _rendezvous(devices: Path = Path("/sys/class/infiniband")) -> str | None:
    """From which size on UCX asks before it sends; None: its own choice.

    Over TCP never: a question costs a round trip for each frame and half of a fast link's
    throughput (measured); `Taken` and the sender's window do what it is for. With RDMA it is what
    lets the network card read from where the payload lies.
    """
    with contextlib.suppress(OSError):
        if any(devices.iterdir()):
            return None
    return "inf"


async def _cancel_all() -> None:
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks, timeout=2.0) if tasks else None
