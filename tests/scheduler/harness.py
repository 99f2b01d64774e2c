# SPDX-License-Identifier: Apache-2.0
"""Drives an engine step by step: requests, reference outputs, and what is left afterwards."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .engine import ADAPTERS, STORE


class Harness:
    """One engine, its scheduler, prompts, and reference outputs of ordinary requests."""

    def __init__(self, llm: Any, flavour: str, adapters: Path | None = None) -> None:
        """`adapters`: the folder that holds a LoRA adapter for each name in ADAPTERS."""
        from lynx_connector.scheduler import startup

        self.flavour, _, self.variant = flavour.partition("+")
        self.v2 = self.flavour.startswith("v2")
        self.asynchronous = self.flavour.endswith("async")
        self._adapters = adapters
        self.store = Path(STORE["kv_connector_extra_config"]["shared_storage_path"])
        self.tokenizer = llm.get_tokenizer()
        self.engine = llm.llm_engine
        self.core = self.engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        self.connector = startup.find_lynx(self.scheduler.connector)
        self.port = self.connector.speculation
        self.runner = self.core.model_executor.driver_worker.worker.model_runner
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.free_blocks = self.pool.get_num_free_blocks()
        self.stats: list[Any] = []
        self._names = 0
        self._references: dict[str, Any] = {}
        rng = random.Random(7)
        lengths = {"A": 100, "B": 61, "C": 40, "D": 9, "E": 64, "F": 65, "ONE": 1}
        self.prompts = {
            name: [rng.randrange(258, 500) for _ in range(n)] for name, n in lengths.items()
        }

    # ---- requests

    def add(
        self,
        prompt: str | list[int],
        transfer: dict[str, Any] | None = None,
        lora: str | None = None,
        **params: Any,
    ) -> str:
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        self._names += 1
        name = f"r{self._names}"
        most = 26 if self.v2 else 40  # Triton's interpreter takes 30 ms a step
        params = {"temperature": 0, "max_tokens": most, "ignore_eos": True} | params
        tokens = self.prompts[prompt] if isinstance(prompt, str) else prompt
        extra = {"kv_transfer_params": transfer} if transfer else None
        adapter = None
        if lora is not None:
            path = str(self._adapters / lora)
            adapter = LoRARequest(lora, 1 + ADAPTERS.index(lora), path)
        self.engine.add_request(
            name,
            {"prompt_token_ids": tokens},
            SamplingParams(extra_args=extra, **params),
            lora_request=adapter,
        )
        return name

    def lynx(
        self, prompt: str, *, anchor: int = 2, residual: int = 16, bits: int = 4, **params: Any
    ) -> str:
        """A request whose KV comes in two tiers."""
        lora = params.get("lora")
        transfer = {
            "load": self.save(prompt, lora),
            "anchor_delay": anchor,
            "residual_delay": residual,
            "bits": bits,
        }
        for key in ("fail", "fail_early", "lose_anchor", "blocking", "first", "first_delay"):
            if key in params:
                transfer[key] = params.pop(key)
        return self.add(prompt, transfer, **params)

    def save(self, prompt: str, lora: str | None = None) -> str:
        """Have the exact KV of a prompt stored, once, under the key that is returned."""
        from .fake_transfer import FakeTransferConnector

        key = prompt if lora is None else f"{prompt}+{lora}"
        if key not in FakeTransferConnector.stored:
            self.add(prompt, {"save": key}, lora=lora, max_tokens=1)
            self.run()
            self.settle()
        return key

    def step(self) -> list[Any]:
        return self.engine.step()

    def run(self, on_step: Callable[[int], Any] | None = None) -> dict[str, Any]:
        """Step until nothing is left; the last output of every request, by name."""
        outputs: dict[str, Any] = {}
        self.emissions: dict[str, list[int]] = {}
        for i in range(4000):
            if not self.engine.has_unfinished_requests():
                return outputs
            for output in self.step():
                outputs[output.request_id] = output
                self.emissions.setdefault(output.request_id, []).append(i)
            if on_step is not None:
                on_step(i)
        raise AssertionError(f"stuck: {self.scheduler.requests}")

    def reference(self, prompt: str, **params: Any) -> Any:
        """The completion of an ordinary request on an empty prefix cache."""
        key = repr((prompt, sorted(params.items(), key=lambda item: item[0])))
        if key not in self._references:
            self.save(prompt, params.get("lora"))
            name = self.add(prompt, **params)
            self._references[key] = self.run()[name].outputs[0]
            self.settle()
        return self._references[key]

    # ---- observations

    def events(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self.port.events if event["event"] == name]

    def verified(self) -> dict[str, Any]:
        """The one verification of this case."""
        (event,) = self.events("verified")
        return event

    def force(self, drafts: list[int]) -> None:
        """Replace what was drafted, until the end of the case."""
        verifier = self.scheduler._verifier
        start = type(verifier).start

        def forced(request: Any, path: Any, drafting: Any) -> None:
            drafting.drafts[:] = drafts[: len(drafting.drafts)]
            start(verifier, request, path, drafting)

        verifier.start = forced

    def settle(self) -> None:
        """Drain the engine and assert that nothing is left of the requests."""
        for _ in range(6):
            self.core.step_fn()
        scheduler = self.scheduler
        scheduler._verifier.__dict__.pop("start", None)
        scheduler._verifier._opaque = False
        assert not scheduler.requests
        assert not scheduler._drafting
        assert not scheduler._restoring
        assert not scheduler._filed
        assert not scheduler._handed_over
        assert len(scheduler._verifier) == 0
        assert not scheduler._verifier._logprobs
        assert not scheduler.deferred_frees
        assert not self.connector._params
        assert scheduler.sched_step_seq == scheduler.processed_step_seq
        assert self.pool.get_num_free_blocks() == self.free_blocks
        known = self.runner.req_states.req_id_to_index if self.v2 else self.runner.requests
        assert not known, f"the runner still knows {list(known)}"
        assert scheduler.kv_cache_manager.reset_prefix_cache()
        self.port.events.clear()
