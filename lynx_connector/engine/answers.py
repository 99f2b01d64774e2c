# SPDX-License-Identifier: Apache-2.0
"""What the front end knows of requests that failed: vLLM tells it nothing but that they did.

Causes come with the statistics of the same engine step, or of one before. Pure Python.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable

from lynx_connector.engine.requests import member

MAX_KEPT = 1024
WAIT_SECONDS = 0.5
POLL_SECONDS = 0.02


class Answers:
    """Sentences for clients, by what the requests of one HTTP call have in common."""

    def __init__(self) -> None:
        self._sentences: OrderedDict[str, str] = OrderedDict()
        self.count_refused: Callable[[str, str], None] = lambda role, code: None
        """Counts a request that never reached an engine: (role, code of its failure)."""

    def explain(self, request_id: str, sentence: str) -> None:
        """Why a request's transfer failed; `request_id` as in the engine."""
        self._sentences[member(request_id).family] = sentence
        while len(self._sentences) > MAX_KEPT:
            self._sentences.popitem(last=False)

    async def find(self, request_id: str) -> str | None:
        """Why a request failed, `request_id` as in its answer; None where no transfer did.

        An engine's statistics are read after its outputs: so a short while is waited for them.
        """
        for _ in range(int(WAIT_SECONDS / POLL_SECONDS)):
            if (sentence := self._sentences.get(request_id)) is not None:
                return sentence
            await asyncio.sleep(POLL_SECONDS)
        return None


ANSWERS = Answers()
"""Those of this process."""
