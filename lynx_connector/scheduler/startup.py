# SPDX-License-Identifier: Apache-2.0
"""What LynxScheduler refuses at start-up, each with its remedy.

How vLLM picks the scheduler (vllm/config/scheduler.py:228, vllm/v1/engine/core.py:161, 220): with
`--scheduler-cls` it takes the named class as it is, while `--async-scheduling` (default: on, except
on CPU and with some executors) alone decides whether the engine keeps two batches in flight. The
two have to match, and only the scheduler can tell.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import FullAttentionSpec, UniformTypeKVCacheSpecs

from lynx_connector.errors import ConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

    from lynx_connector.scheduler.port import SpeculationPort

logger = init_logger(f"vllm.{__name__}")

_PATH = "lynx_connector.scheduler"


def find_lynx(connector: Any) -> Any:
    """The connector that hands over KV in tiers: `connector`, or one inside a MultiConnector.

    None where there is none.

    Raises:
        ConfigError: there are two.
    """
    if hasattr(connector, "speculation"):
        return connector
    found = [one for child in _children(connector) if (one := find_lynx(child)) is not None]
    if len(found) > 1:
        raise ConfigError(
            "LynxConnector stands twice in kv_connector_extra_config.connectors. Remedy: name it "
            "once; kv_role 'kv_both' serves both directions."
        )
    return found[0] if found else None


def _children(connector: Any) -> list[Any]:
    return list(getattr(connector, "sub_connectors", ()))


def find_port(scheduler: Scheduler) -> SpeculationPort | None:
    """The connector's speculation port; None where there is nothing to speculate on.

    Raises:
        ConfigError: no connector is one that hands over KV in tiers.
    """
    connector = scheduler.connector
    if connector is None:
        logger.warning(
            "No KV connector is configured: %s works as vLLM's own.", type(scheduler).__name__
        )
        return None
    lynx = find_lynx(connector)
    if lynx is None:
        role = scheduler.vllm_config.kv_transfer_config.kv_role
        ours = f'{{"kv_connector":"LynxConnector","kv_role":"{role}"}}'
        names = [type(child).__name__ for child in _children(connector)]
        raise ConfigError(
            f"--scheduler-cls {_PATH}.{type(scheduler).__name__} needs LynxConnector, but the KV "
            f"connector is {type(connector).__name__}{names or ''}. Remedy: "
            + (f"add {ours} to its connectors" if names else f"--kv-transfer-config '{ours}'")
            + ", or drop --scheduler-cls."
        )
    port: SpeculationPort | None = lynx.speculation
    if port is None:
        return None
    if scheduler.vllm_config.speculative_config is not None:
        logger.warning(
            "--speculative-config is set: no request starts speculatively on its anchor, each "
            "waits for the final tier of its KV and then decodes with vLLM's own drafts."
        )
        return None
    siblings = [type(child).__name__ for child in _children(connector) if child is not lynx]
    if siblings:
        logger.warning(
            "LynxConnector shares its requests with %s, which may keep their KV: no request "
            "starts speculatively on its anchor, each waits for the final tier.",
            ", ".join(siblings),
        )
        port.start_blocking()
    return port


def check_mode(vllm_config: VllmConfig, *, asynchronous: bool) -> None:
    """Refuse a scheduler whose mode is not the engine's.

    Raises:
        ConfigError: naming the class to use.
    """
    pipelined = vllm_config.max_concurrent_batches > 1
    if pipelined and not asynchronous:
        raise ConfigError(
            "vLLM schedules asynchronously here, which LynxScheduler does not. Remedy: "
            f"--scheduler-cls {_PATH}.LynxAsyncScheduler, or --no-async-scheduling."
        )
    if asynchronous and not pipelined:
        raise ConfigError(
            "vLLM schedules synchronously here, LynxAsyncScheduler does not. Remedy: "
            f"--scheduler-cls {_PATH}.LynxScheduler, or --async-scheduling where it is supported."
        )


def check_supported(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
    """Refuse configurations in which drafts could not be verified exactly.

    Raises:
        ConfigError: naming the obstacle and the remedy.
    """
    parallel = vllm_config.parallel_config
    obstacle = None
    if parallel.pipeline_parallel_size > 1:
        obstacle = "pipeline parallelism (other ranks than the last cannot take drafts back)"
    elif parallel.prefill_context_parallel_size > 1 or parallel.decode_context_parallel_size > 1:
        obstacle = "context parallelism"
    elif parallel.use_ubatching:
        obstacle = "dual batch overlap (it splits the rows of one verification)"
    elif not all(_keeps_blocks(group.kv_cache_spec) for group in kv_cache_config.kv_cache_groups):
        obstacle = "a model whose layers are not all full attention (its cache cannot be rewound)"
    if obstacle is not None:
        raise ConfigError(
            f"speculative start does not support {obstacle}. Remedy: change that, or drop "
            "--scheduler-cls: LynxConnector then waits for the final tier of every request."
        )


def _keeps_blocks(spec: KVCacheSpec) -> bool:
    """Whether a layer keeps every token's K/V in place for as long as its request lives."""
    if isinstance(spec, UniformTypeKVCacheSpecs):
        return all(_keeps_blocks(inner) for inner in spec.kv_cache_specs.values())
    return isinstance(spec, FullAttentionSpec)
