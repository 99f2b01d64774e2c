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

from lynx_connector.config import LynxConfig
from lynx_connector.connector import LynxConnector
from lynx_connector.engine import compat
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


def _scheduler(connector: Any, speculative_config: Any = None) -> Any:
    transfer = SimpleNamespace(kv_role="kv_producer")
    config = SimpleNamespace(kv_transfer_config=transfer, speculative_config=speculative_config)
    return SimpleNamespace(connector=connector, vllm_config=config)


class _Port:
    blocking = False

    def start_blocking(self) -> None:
        self.blocking = True


def _several(*connectors: Any) -> Any:
    return SimpleNamespace(sub_connectors=list(connectors))


def test_another_connector_is_refused() -> None:
    ours = '"kv_connector":"LynxConnector","kv_role":"kv_producer"'
    with pytest.raises(ConfigError, match=f"--kv-transfer-config '{{{ours}"):
        startup.find_port(_scheduler(object()))
    with pytest.raises(ConfigError, match=f"add {{{ours}}} to its connectors"):
        startup.find_port(_scheduler(_several(object(), object())))


def test_no_connector_or_no_port_means_stock_behaviour() -> None:
    assert startup.find_port(_scheduler(None)) is None
    assert startup.find_port(_scheduler(SimpleNamespace(speculation=None))) is None
    inside = _several(object(), SimpleNamespace(speculation=None))
    assert startup.find_port(_scheduler(inside)) is None


@pytest.mark.parametrize("at", [0, 1, 2])
def test_lynx_is_found_among_several_connectors_and_then_starts_blocking(at: int) -> None:
    lynx = SimpleNamespace(speculation=_Port())
    connectors = [object(), object()]
    connectors.insert(at, lynx)
    assert startup.find_port(_scheduler(_several(*connectors))) is lynx.speculation
    assert lynx.speculation.blocking


def test_alone_in_a_multi_connector_it_speculates() -> None:
    lynx = SimpleNamespace(speculation=_Port())
    assert startup.find_port(_scheduler(_several(lynx))) is lynx.speculation
    assert not lynx.speculation.blocking


def test_lynx_twice_is_refused() -> None:
    lynx = SimpleNamespace(speculation=_Port())
    with pytest.raises(ConfigError, match="stands twice"):
        startup.find_port(_scheduler(_several(lynx, _several(lynx))))


def test_another_connectors_handshake_is_refused() -> None:
    """MultiConnector hands every connector what the first one of them says of its workers."""
    half: Any = SimpleNamespace(_producer=object())
    with pytest.raises(ConfigError, match="name LynxConnector first"):
        LynxConnector.set_xfer_handshake_metadata(half, {0: object()})


def _config(**parallel: Any) -> Any:
    defaults = {
        "pipeline_parallel_size": 1,
        "prefill_context_parallel_size": 1,
        "decode_context_parallel_size": 1,
        "use_ubatching": False,
    }
    return SimpleNamespace(parallel_config=SimpleNamespace(**(defaults | parallel)))


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


def test_beside_speculative_decoding_nothing_is_speculated_on() -> None:
    lynx = SimpleNamespace(speculation=_Port())
    assert startup.find_port(_scheduler(lynx, speculative_config=object())) is None


@pytest.mark.parametrize("scheduler", ["lynx_connector.scheduler.LynxScheduler", None])
def test_beside_speculative_decoding_loads_start_blocking(scheduler: str | None) -> None:
    config: Any = SimpleNamespace(
        scheduler_config=SimpleNamespace(scheduler_cls=scheduler),
        kv_transfer_config=SimpleNamespace(is_kv_consumer=True),
        speculative_config=object(),
    )
    for start in ("auto", "blocking"):
        assert not compat.resolve_start(LynxConfig.from_extra_config({"start": start}), config)
    with pytest.raises(ConfigError, match="drop --speculative-config"):
        compat.resolve_start(LynxConfig.from_extra_config({"start": "speculative"}), config)
    config.kv_transfer_config.is_kv_consumer = False
    assert not compat.resolve_start(LynxConfig.from_extra_config({"start": "speculative"}), config)


def test_sliding_windows_are_refused() -> None:
    cache = _cache(_attention(FullAttentionSpec), _attention(SlidingWindowSpec, sliding_window=128))
    with pytest.raises(ConfigError, match="full attention"):
        startup.check_supported(_config(), cache)
