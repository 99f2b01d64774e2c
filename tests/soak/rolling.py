# SPDX-License-Identifier: Apache-2.0
"""A rolling restart: every server in turn is told to go, ends, starts and is back, and no request
may notice.

A server that ends answers what comes with an empty `abort`, so the router has to know first. A
stock vllm-router forgets a server when it is told to (`/remove_worker`), but in prefill/decode mode
it takes none back (`/add_worker` answers 400): a fresh router does, and starts in a second.
"""

import asyncio
import time
from collections.abc import Callable

import httpx

from lynx_connector.testbed.process import ServerError, ServerProcess
from tests.soak.faults import ServerFaults
from tests.soak.load import Load
from tests.soak.servers import Fleet, ready

ON_ITS_WAY_SECONDS = 0.5
"""For a prefill leg that the router has already addressed."""
ROUTER_TIMEOUT = 60.0


async def roll(
    fleet: Fleet,
    servers: list[ServerProcess],
    load: Load,
    faults: ServerFaults,
    say: Callable[[str], None],
) -> None:
    """Restart these engines one after the other, under `load`'s requests.

    Raises:
        ServerError: a router did not do as told, or a server did not come back.
    """
    usual, router = load.router, None
    try:
        for number, server in enumerate(servers):
            before, router = router, fleet.make_router(f"router-{number}")
            router.start()
            await ready([router], ROUTER_TIMEOUT)
            load.router = router
            if before is not None:
                await load.answered()
                await asyncio.to_thread(before.stop)
            await _forget(router, server)
            if server in fleet.decodes:
                await load.answered()  # decode legs follow only when their prefill is done
            else:
                await asyncio.sleep(ON_ITS_WAY_SECONDS)
            began = time.monotonic()
            await faults.roll(server)
            say(f"{server.name} restarted in {time.monotonic() - began:.0f} s")
    finally:
        load.router = usual
        if router is not None:
            try:
                await load.answered()
            finally:
                await asyncio.to_thread(router.stop)


async def _forget(router: ServerProcess, server: ServerProcess) -> None:
    async with httpx.AsyncClient(trust_env=False, timeout=10) as http:
        reply = await http.post(f"{router.url}/remove_worker", params={"url": server.url})
    if reply.status_code != 200:
        raise ServerError(f"{router.name} keeps {server.name}: {reply.status_code} {reply.text}")
