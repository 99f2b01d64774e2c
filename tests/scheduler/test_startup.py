# SPDX-License-Identifier: Apache-2.0
"""What LynxScheduler refuses at start-up, and that vLLM finds it by name. No engine is started."""

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.config import SchedulerConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from lynx_connector.errors import ConfigError
from lynx_connector.scheduler import startup


@pytest.mark.parametrize(
    ("name", "base"), [("LynxScheduler", Scheduler), ("LynxAsyncScheduler", AsyncScheduler)]
)
def test_vllm_resolves_the_class(name: str, base: type) -> None:
    config = SchedulerConfig.default_factory(scheduler_cls=f"lynx_connector.scheduler.{name}")
    found = config.get_scheduler_cls()
    assert issubclass(found, base)
    assert found.__name__ == name


@pytest.mark.parametrize(
    ("batches", "asynchronous", "remedy"),
    [(2, False, "LynxAsyncScheduler"), (1, True, "LynxScheduler")],
)
def test_the_mode_must_match(batches: int, asynchronous: bool, remedy: str) -> None:
    config: Any = SimpleNamespace(max_concurrent_batches=batches)
    with pytest.raises(ValueError, match=rf"scheduler\.{remedy}"):
        startup.check_mode(config, asynchronous=asynchronous)
    startup.check_mode(config, asynchronous=not asynchronous)


def test_another_connector_is_refused() -> None:
    scheduler: Any = SimpleNamespace(connector=object())
    with pytest.raises(ConfigError, match='"kv_connector":"LynxConnector"'):
        startup.find_port(scheduler)


def test_no_connector_or_no_port_means_stock_behaviour() -> None:
    nothing: Any = SimpleNamespace(connector=None)
    assert startup.find_port(nothing) is None
    producer: Any = SimpleNamespace(connector=SimpleNamespace(speculation=None))
    assert startup.find_port(producer) is None


def _config(**parallel: Any) -> Any:
    defaults = {
        "pipeline_parallel_size": 1,
        "prefill_context_parallel_size": 1,
        "decode_context_parallel_size": 1,
        "use_ubatching": False,
    }
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**(defaults | parallel)), speculative_config=None
    )


def _cache(*specs: Any) -> Any:
    return SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec) for spec in specs])


def _attention(kind: type, **options: Any) -> Any:
    import torch

    return kind(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.float32, **options)


@pytest.mark.parametrize(
    ("parallel", "words"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline"),
        ({"prefill_context_parallel_size": 2}, "context parallelism"),
        ({"decode_context_parallel_size": 2}, "context parallelism"),
        ({"use_ubatching": True}, "dual batch overlap"),
    ],
)
def test_parallelism_that_cannot_be_verified(parallel: dict[str, Any], words: str) -> None:
    cache = _cache(_attention(FullAttentionSpec))
    startup.check_supported(_config(), cache)
    with pytest.raises(ConfigError, match=rf"(?s){words}.*drop --scheduler-cls"):
        startup.check_supported(_config(**parallel), cache)


def test_speculative_decoding_is_refused() -> None:
    config = _config()
    config.speculative_config = object()
    with pytest.raises(ConfigError, match="--speculative-config"):
        startup.check_supported(config, _cache(_attention(FullAttentionSpec)))


def test_sliding_windows_are_refused() -> None:
    cache = _cache(_attention(FullAttentionSpec), _attention(SlidingWindowSpec, sliding_window=128))
    with pytest.raises(ConfigError, match="full attention"):
        startup.check_supported(_config(), cache)
