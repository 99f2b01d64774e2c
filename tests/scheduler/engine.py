# SPDX-License-Identifier: Apache-2.0
"""One in-process vLLM engine, in one of four flavours, or a variant of one.

CPU has no asynchronous scheduling: the async flavours give the engine its queue of two batches and
the asynchronous scheduler, while the model runner stays synchronous. V2 has no CPU backend: its
Triton kernels run in Triton's interpreter.
"""

from __future__ import annotations

import os
import tempfile
import types
from typing import Any

FLAVOURS = ("v1-sync", "v1-async", "v2-sync", "v2-async")
_LORA: dict[str, Any] = {"enable_lora": True, "max_lora_rank": 8, "max_cpu_loras": 3}
_FAKE = {
    "kv_connector": "FakeTransferConnector",
    "kv_role": "kv_both",
    "kv_connector_module_path": "tests.scheduler.fake_transfer",
}
STORE: dict[str, Any] = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}


def _several(*connectors: dict[str, Any]) -> dict[str, Any]:
    config = {"kv_connector": "MultiConnector", "kv_role": "kv_both"}
    config |= {"kv_connector_extra_config": {"connectors": list(connectors)}}
    return {"kv_transfer_config": config | {"kv_load_failure_policy": "recompute"}}


VARIANTS: dict[str, dict[str, Any]] = {
    "multi": _several(_FAKE, STORE),
    "multi_last": _several(STORE, _FAKE),
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
    STORE["kv_connector_extra_config"] = {"shared_storage_path": tempfile.mkdtemp()}
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
