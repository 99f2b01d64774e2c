# SPDX-License-Identifier: Apache-2.0
"""A rate limit in the sender, for links that must not be filled (and for tests of slow links)."""

import asyncio
import time


class RateLimiter:
    """Spaces frames so that their mean rate stays below `mbit` Mbit/s; 0 means no limit."""

    def __init__(self, mbit: float):
        self._seconds_per_byte = 8e-6 / mbit if mbit else 0.0
        self._free_at = 0.0

    async def acquire(self, num_bytes: int) -> None:
        """Wait until the bytes sent before have left at the limited rate."""
        if not self._seconds_per_byte:
            return
        now = time.monotonic()
        start = max(now, self._free_at)
        self._free_at = start + num_bytes * self._seconds_per_byte
        # Wait for this frame's own duration, as a link would: it arrives when it has been sent.
        await asyncio.sleep(self._free_at - now)
