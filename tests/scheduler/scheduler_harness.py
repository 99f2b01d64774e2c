# SPDX-License-Identifier: Apache-2.0
"""Drives one in-process vLLM engine step by step, in one of four flavours, or a variant of one.

`python scheduler_harness.py FLAVOUR MODEL_FOLDER RESULTS.json [CASE ...]` runs the case list and
writes {case: {"ok", "seconds", "detail"}}. A flavour needs a process of its own: environment
variables choose the model runner, and vLLM engines do not share a process well.

CPU has no asynchronous scheduling: the async flavours give the engine its queue of two batches and
the asynchronous scheduler, while the model runner stays synchronous. V2 has no CPU backend: its
Triton kernels run in Triton's interpreter.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

FLAVOURS = ("v1-sync", "v1-async", "v2-sync", "v2-async")
_LORA: dict[str, Any] = {"enable_lora": True, "max_lora_rank": 8, "max_cpu_loras": 3}
_FAKE = {
    "kv_connector": "FakeTransferConnector",
    "kv_role": "kv_both",
    "kv_connector_module_path": "fake_transfer",
}
_STORE: dict[str, Any] = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}


def _several(*connectors: dict[str, Any]) -> dict[str, Any]:
    config = {"kv_connector": "MultiConnector", "kv_role": "kv_both"}
    config |= {"kv_connector_extra_config": {"connectors": list(connectors)}}
    return {"kv_transfer_config": config | {"kv_load_failure_policy": "recompute"}}


VARIANTS: dict[str, dict[str, Any]] = {
    "multi": _several(_FAKE, _STORE),
    "multi_last": _several(_STORE, _FAKE),
    "lora1": _LORA | {"max_loras": 1},
    "lora2": _LORA | {"max_loras": 2},
}
"""What an engine is started with beside the flavour; "v1-sync+lora1" names both."""
ADAPTERS = ("a", "b", "c")
MAX_NUM_SEQS = 8
BLOCK_SIZE = 32
NUM_BLOCKS = 80


def prepare(flavour: str) -> None:
    """Set what must be set before vLLM is imported."""
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_USE_V2_MODEL_RUNNER=str(int(flavour.startswith("v2"))),
        OMP_NUM_THREADS="1",
        HF_HUB_OFFLINE="1",
        VLLM_NO_USAGE_STATS="1",
    )
    if flavour.startswith("v2"):
        os.environ["TRITON_INTERPRET"] = "1"
        import triton.backends
        from triton.runtime.interpreter import InterpreterBuilder

        store = InterpreterBuilder.create_masked_store

        def masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *options: Any) -> Any:
            mask.data = mask.data.astype(bool)  # a uint8 mask is fine on a GPU
            return store(self, ptrs, value, mask, *options)

        InterpreterBuilder.create_masked_store = masked_store
        driver = type("Driver", (), {"is_active": staticmethod(lambda: False)})
        triton.backends.backends.setdefault(
            "cpu", types.SimpleNamespace(driver=driver, compiler=None)
        )


def build(flavour: str, model: str, **options: Any) -> Any:
    """An engine of the flavour with LynxScheduler and the fake connector."""
    from vllm import LLM
    from vllm.config import VllmConfig

    flavour, _, variant = flavour.partition("+")
    options = VARIANTS.get(variant, {}) | options
    asynchronous = flavour.endswith("async")
    if asynchronous:
        VllmConfig.max_concurrent_batches = property(lambda self: 2)
    scheduler = "LynxAsyncScheduler" if asynchronous else "LynxScheduler"
    _STORE["kv_connector_extra_config"] = {"shared_storage_path": tempfile.mkdtemp()}
    if options.get("enable_lora"):
        spare_base_requests()
    defaults: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 512,
        "max_num_seqs": MAX_NUM_SEQS,
        "max_num_batched_tokens": 256,
        "block_size": BLOCK_SIZE,
        "num_gpu_blocks_override": NUM_BLOCKS,
        "enforce_eager": True,
        "enable_prefix_caching": True,
        "disable_log_stats": False,
        "scheduler_cls": f"lynx_connector.scheduler.{scheduler}",
        "kv_transfer_config": _FAKE | {"kv_load_failure_policy": "recompute"},
    }
    return LLM(model, **(defaults | options))


def spare_base_requests() -> None:
    """Have vLLM's CPU operations for LoRA leave the rows of requests without an adapter alone.

    The index of such a row is -1, which they take for the last adapter: in a batch with adapters
    the CPU build answers requests of the base model with that one's weights. GPU kernels do not.
    """
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    shrink = lora_ops.bgmv_shrink

    def spared(x: Any, weights: Any, y: Any, indices: Any, *scale: Any) -> None:
        shrink(x * (indices >= 0).unsqueeze(1), weights, y, indices, *scale)

    lora_ops.bgmv_shrink = punica_cpu.bgmv_shrink = spared


class Harness:
    """One engine, its scheduler, prompts, and reference outputs of ordinary requests."""

    def __init__(self, llm: Any, flavour: str, adapters: Path | None = None) -> None:
        """`adapters`: the folder that holds a LoRA adapter for each name in ADAPTERS."""
        from lynx_connector.scheduler import startup

        self.flavour, _, self.variant = flavour.partition("+")
        self.v2 = self.flavour.startswith("v2")
        self.asynchronous = self.flavour.endswith("async")
        self._adapters = adapters
        self.store = Path(_STORE["kv_connector_extra_config"]["shared_storage_path"])
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
        from fake_transfer import FakeTransferConnector

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


def main() -> None:
    flavour, model, results_path, *only = sys.argv[1:]
    prepare(flavour)
    import early_reply_cases  # noqa: F401  registers its cases
    import first_token_cases  # noqa: F401  registers its cases
    import full_cache_cases  # noqa: F401  registers its cases
    import lora_cases  # noqa: F401  registers its cases
    import multi_connector_cases  # noqa: F401  registers its cases
    from scheduler_cases import CASES

    started = time.monotonic()
    harness = Harness(build(flavour, model), flavour, Path(model).parent)
    print(f"{flavour}: up in {time.monotonic() - started:.0f} s", flush=True)
    results: dict[str, dict[str, Any]] = {}
    broken = None
    for name, case in CASES.items():
        if (only and name not in only) or not case.runs_on(flavour):
            continue
        started = time.monotonic()
        try:
            if broken:
                raise RuntimeError(f"not run: the engine broke in {broken}")
            case.run(harness)
            harness.settle()
            detail = ""
        except Exception:
            detail = traceback.format_exc()
            broken = broken or _recover(harness, name)
        seconds = time.monotonic() - started
        results[name] = {"ok": not detail, "seconds": round(seconds, 2), "detail": detail}
        print(f"{'FAIL' if detail else 'ok':5}{name} {seconds:.1f} s", flush=True)
        if detail:
            print(detail, flush=True)
    Path(results_path).write_text(json.dumps(results))


def _recover(harness: Harness, name: str) -> str | None:
    """Try to leave a clean engine to the next case; `name` if that fails."""
    try:
        harness.engine.abort_request(list(harness.engine.output_processor.request_states))
        harness.run()
        harness.settle()
    except Exception:
        return name
    return None


if __name__ == "__main__":
    main()
