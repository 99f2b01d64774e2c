# SPDX-License-Identifier: Apache-2.0
"""What differs between vLLM versions, and which configurations Lynx refuses.

Beside it only `kv_layout.py`, `connector.py` and `scheduler/` import vLLM's unstable classes.
"""

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import vllm
from lynx_kernels.shared.rotation import NO_ROTATION, Rotation, fit_rotation
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from lynx_connector import __version__
from lynx_connector.config import LynxConfig, StartMode
from lynx_connector.engine.cache_spec import check_cache_spec
from lynx_connector.errors import ConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

__all__ = [
    "KVConnectorBase_V1",
    "KVConnectorHandshakeMetadata",
    "KVConnectorMetadata",
    "KVConnectorPromMetrics",
    "KVConnectorRole",
    "KVConnectorStats",
    "KVConnectorTransferResults",
    "KVConnectorWorkerMetadata",
    "check_bootstrap",
    "check_supported",
    "has_lynx_scheduler",
    "key_rotation",
    "resolve_start",
    "tap_queries",
    "warm_up_verification",
]

SUPPORTED_VLLM = "0.32"

logger = logging.getLogger("vllm.lynx")


def check_vllm_version(version: str) -> None:
    """Refuse a vLLM whose private methods were not tested.

    Raises:
        ConfigError: naming the version found and the one needed.
    """
    if not version.startswith(SUPPORTED_VLLM + "."):
        raise ConfigError(
            f"vllm {version}: lynx-connector {__version__} works with vllm {SUPPORTED_VLLM}.x "
            f"only; install 'vllm=={SUPPORTED_VLLM}.*' or a matching lynx-connector"
        )


def check_supported(vllm_config: "VllmConfig", kv_cache_config: "KVCacheConfig | None") -> None:
    """Refuse combinations that would give wrong tokens.

    Raises:
        ConfigError: naming the setting, its value and the remedy.
    """
    check_vllm_version(vllm.__version__)
    parallel = vllm_config.parallel_config
    sizes = {
        "pipeline_parallel_size": parallel.pipeline_parallel_size,
        "decode_context_parallel_size": parallel.decode_context_parallel_size,
        "prefill_context_parallel_size": getattr(parallel, "prefill_context_parallel_size", 1),
    }
    for key, value in sizes.items():
        if value > 1:
            raise ConfigError(f"{key} = {value}: LynxConnector supports 1; set --{_flag(key)} 1")
    if getattr(parallel, "enable_dbo", False):
        raise ConfigError("enable_dbo = True: LynxConnector needs it off; drop --enable-dbo")
    if kv_cache_config is None:
        return
    groups = kv_cache_config.kv_cache_groups
    for group in groups:  # the first that is refused tells more than their number
        check_cache_spec(group.kv_cache_spec)
    if len(groups) != 1:
        raise ConfigError(
            f"the model has {len(groups)} KV cache groups; LynxConnector supports one "
            "(attention layers of one shape)"
        )


def _flag(key: str) -> str:
    return key.replace("_", "-")


def _scheduler_name(vllm_config: "VllmConfig") -> str:
    scheduler_cls = vllm_config.scheduler_config.scheduler_cls
    if isinstance(scheduler_cls, str):
        return scheduler_cls
    return getattr(scheduler_cls, "__qualname__", "")


def has_lynx_scheduler(vllm_config: "VllmConfig") -> bool:
    """Whether this instance runs with one of Lynx's schedulers."""
    name = _scheduler_name(vllm_config)
    return name.rsplit(".", 1)[-1] in ("LynxScheduler", "LynxAsyncScheduler")


def check_bootstrap(config: LynxConfig, vllm_config: "VllmConfig") -> None:
    """Refuse a bootstrap server that several engines would have to share.

    Raises:
        ConfigError: naming both settings.
    """
    size = vllm_config.parallel_config.data_parallel_size
    if config.bootstrap_port and size > 1:
        raise ConfigError(
            f"kv_connector_extra_config.bootstrap_port = {config.bootstrap_port} does not go with "
            f"--data-parallel-size {size}: run one server per engine, or a router that speaks the "
            "NIXL handoff and bootstrap_port 0"
        )


def resolve_start(config: LynxConfig, vllm_config: "VllmConfig") -> bool:
    """Whether requests of this consumer start on the anchor unless they say otherwise.

    Never beside vLLM's own speculative decoding, which drafts from what it takes for the truth.

    Raises:
        ConfigError: `start: speculative` without LynxScheduler, or beside `speculative_config`.
    """
    present = has_lynx_scheduler(vllm_config)
    kv_transfer = vllm_config.kv_transfer_config
    if vllm_config.speculative_config is not None:
        if config.start is StartMode.SPECULATIVE and kv_transfer.is_kv_consumer:
            raise ConfigError(
                "kv_connector_extra_config.start = 'speculative' does not go with "
                "--speculative-config; set start to 'auto' or 'blocking', or drop "
                "--speculative-config"
            )
        return False
    if config.start is StartMode.SPECULATIVE and not present and kv_transfer.is_kv_consumer:
        raise ConfigError(
            "kv_connector_extra_config.start = 'speculative' needs --scheduler-cls "
            "lynx_connector.scheduler.LynxScheduler (or LynxAsyncScheduler with asynchronous "
            f"scheduling), found {_scheduler_name(vllm_config) or 'none'}; "
            "or set start to 'blocking'"
        )
    return present and config.start is not StartMode.BLOCKING


def key_rotation(head_dim: int) -> Rotation:
    """What the model in this process does to K by its position; NO_ROTATION where it is not known.

    Read off vLLM's own tables: model_executor/layers/rotary_embedding/__init__.py keeps every
    module that a model has asked for in `_ROPE_DICT`. Layers with different rotations count as
    unknown, since nothing says which layer has which.
    """
    from vllm.model_executor.layers import rotary_embedding

    found: set[Rotation | None] = set()
    for module in rotary_embedding._ROPE_DICT.values():
        table = getattr(module, "cos_sin_cache", None)
        if table is None or table.ndim != 2 or table.shape[1] > head_dim:
            found.add(None)
        else:
            found.add(fit_rotation(table, module.is_neox_style))
    if len(found) == 1 and (rotation := next(iter(found))) is not None:
        return rotation
    logger.warning(
        "lynx: K's rotation is not known (%d kinds of rotary embedding): codec klt decorrelates K "
        "after it, at about twice the anchor's error",
        len(found),
    )
    return NO_ROTATION


def tap_queries(
    vllm_config: "VllmConfig", layer_names: Sequence[str], see: Callable[[int, Any, Any], None]
) -> Callable[[], None]:
    """Show each layer's index, query [tokens, heads, D] and slot mapping to `see`, on every pass
    that is not a CUDA graph's; returns what ends that.

    vLLM looks `impl.forward` up for every pass, compiled or not, inside its custom op
    (model_executor/layers/attention/attention.py, unified_attention_with_output).
    """
    layers = vllm_config.compilation_config.static_forward_context
    tapped = [layers[name].impl for name in layer_names]

    def tap(index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(
            layer: Any,
            query: Any,
            key: Any,
            value: Any,
            cache: Any,
            metadata: Any,
            *args: Any,
            **kw: Any,
        ) -> Any:
            slots = getattr(metadata, "slot_mapping", None)
            if slots is not None:
                see(index, query, slots)
            return original(layer, query, key, value, cache, metadata, *args, **kw)

        return forward

    for index, impl in enumerate(tapped):
        impl.forward = tap(index, impl.forward)

    def untap() -> None:
        for impl in tapped:
            vars(impl).pop("forward", None)

    return untap


def warm_up_verification(vllm_config: "VllmConfig", device: "torch.device") -> None:
    """Compile what the first one-pass verification would compile for seconds, at start-up.

    vLLM compiles the rank count of its prompt logprobs on first use (v1/sample/ops/logprobs.py,
    V1 runner) and does not warm it up.

    Raises:
        ConfigError: if it cannot be compiled, with the remedy.
    """
    if vllm_config.use_v2_model_runner:
        return
    from vllm.v1.sample.sampler import Sampler

    vocabulary = vllm_config.model_config.get_vocab_size()
    logits = torch.zeros(2, vocabulary, device=device)
    tokens = torch.zeros(2, dtype=torch.int64, device=device)
    try:
        Sampler().gather_logprobs(logits, 1, tokens)
    except Exception as error:
        raise ConfigError(
            "vLLM cannot compile its prompt logprobs, which verification needs "
            f"({type(error).__name__}: {str(error).splitlines()[0][:200]}); install a C++ compiler "
            "(g++), or set start to 'blocking' in kv_connector_extra_config"
        ) from error
