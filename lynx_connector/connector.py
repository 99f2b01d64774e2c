# SPDX-License-Identifier: Apache-2.0
"""LynxConnector: vLLM's view of Lynx. A facade that forwards every call to four halves.

              producer (prefill)              consumer (decode)
scheduler     producer/scheduler.py           consumer/scheduler.py
worker        producer/worker.py              consumer/worker.py

Source of the interface: vllm/distributed/kv_transfer/kv_connector/v1/base.py.
"""

import dataclasses
import functools
import logging
from typing import TYPE_CHECKING, Any

from lynx_connector.config import LynxConfig, PlanMode
from lynx_connector.consumer.scheduler import ConsumerScheduler
from lynx_connector.engine import compat, served
from lynx_connector.engine.cache_spec import NULL_BLOCK
from lynx_connector.engine.compat import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorPromMetrics,
    KVConnectorRole,
    KVConnectorStats,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
)
from lynx_connector.engine.metadata import LynxHandshakeMetadata, LynxMetadata, LynxWorkerMetadata
from lynx_connector.engine.shutdown import ShutdownNotice
from lynx_connector.engine.stats import LynxPromMetrics, LynxStats
from lynx_connector.errors import ConfigError
from lynx_connector.plan import KVShape
from lynx_connector.plan.planner import Planner
from lynx_connector.producer.bootstrap import BootstrapServer
from lynx_connector.producer.scheduler import ProducerScheduler
from lynx_connector.scheduler.port import EarlyReplyPort, SpeculationPort
from lynx_connector.telemetry.events import EventLog
from lynx_connector.telemetry.metrics import CONSUMER, PRODUCER, Meter
from lynx_connector.wire.secrets import SharedSecrets

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from lynx_connector.consumer.worker import ConsumerWorker
    from lynx_connector.producer.worker import ProducerWorker

logger = logging.getLogger("vllm.lynx")

KVConnectorMetadata.register(LynxMetadata)
KVConnectorWorkerMetadata.register(LynxWorkerMetadata)
KVConnectorHandshakeMetadata.register(LynxHandshakeMetadata)


class LynxConnector(KVConnectorBase_V1):
    """KV connector that moves the KV cache in precision tiers."""

    def __init__(
        self, vllm_config: "VllmConfig", role: KVConnectorRole, kv_cache_config: "KVCacheConfig"
    ):
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        self._config = LynxConfig.from_extra_config(transfer.kv_connector_extra_config)
        compat.check_supported(vllm_config, kv_cache_config)
        self._speculative = compat.resolve_start(self._config, vllm_config)
        self._block_size = vllm_config.cache_config.block_size
        self._meter = Meter()
        self._events = EventLog(
            self._config.events_file,
            PRODUCER if transfer.is_kv_producer else CONSUMER,
            self._meter,
            transfer.engine_id,
        )
        self._consumer_events = self._events.for_consumer()
        self._producer: ProducerScheduler | None = None
        self._consumer: ConsumerScheduler | None = None
        self._producer_worker: ProducerWorker | None = None
        self._consumer_worker: ConsumerWorker | None = None
        self._bootstrap: BootstrapServer | None = None
        self._shutdown = ShutdownNotice(vllm_config.shutdown_timeout)
        if role == KVConnectorRole.SCHEDULER:
            self._init_scheduler(vllm_config)
            self._shutdown.listen()

    def _init_scheduler(self, vllm_config: "VllmConfig") -> None:
        from vllm.utils.network_utils import get_ip

        transfer = vllm_config.kv_transfer_config
        tp_size = vllm_config.parallel_config.tensor_parallel_size
        for exposure in self._config.exposures(transfer.is_kv_producer, transfer.is_kv_consumer):
            logger.warning("lynx: %s (docs/security.md)", exposure)
        if transfer.is_kv_producer:
            compat.check_bootstrap(self._config, vllm_config)
            if self._config.bootstrap_port:
                # An engine for each data parallel rank, on consecutive ports.
                port = self._config.bootstrap_port + vllm_config.parallel_config.data_parallel_index
                self._bootstrap = BootstrapServer(
                    port,
                    transfer.engine_id,
                    self._config.listens_on(),
                    SharedSecrets(self._config.secret_file),
                )
            self._producer = ProducerScheduler(
                self._config,
                transfer.engine_id,
                self._config.advertise_host or get_ip(),
                tp_size,
                self._block_size,
                self._events,
                self._planner(vllm_config),
                bootstrap=self._bootstrap,
                v2_runner=vllm_config.use_v2_model_runner,
                custom_logits=bool(vllm_config.model_config.logits_processors),
                prefix_caching=bool(vllm_config.cache_config.enable_prefix_caching),
            )
            early = self._config.early_reply and compat.has_lynx_scheduler(vllm_config)
            logger.info(
                "lynx: prefills are answered when they %s%s",
                "are first scheduled" if early else "have ended",
                "" if early == self._config.early_reply else ": early_reply needs LynxScheduler",
            )
        if transfer.is_kv_consumer:
            cache_tokens = self._kv_cache_config.num_blocks * self._block_size
            self._consumer = ConsumerScheduler(
                self._config,
                self._speculative,
                vllm_config.use_v2_model_runner,
                transfer.kv_load_failure_policy == "recompute",
                tp_size,
                self._block_size,
                self._consumer_events,
                self._config.waiting_tokens or cache_tokens // 2,
            )
            logger.info(
                "lynx: decode requests start %s; on a failed transfer: %s",
                "on the anchor" if self._speculative else "when the final tier has landed",
                transfer.kv_load_failure_policy,
            )

    def _planner(self, vllm_config: "VllmConfig") -> Planner:
        group = self._kv_cache_config.kv_cache_groups[0]
        spec = group.kv_cache_spec
        dtype = str(spec.dtype).rsplit(".")[-1]
        return Planner(
            self._config.plan is PlanMode.AUTO,
            KVShape(len(group.layer_names), spec.num_kv_heads, spec.head_size, dtype),
            "cpu" if vllm_config.device_config.device_type == "cpu" else "gpu",
            self._config.link_mbit,
        )

    # ---- scheduler side ---------------------------------------------------------------------

    @property
    def speculation(self) -> SpeculationPort | None:
        """What LynxScheduler needs; None on an instance that never consumes."""
        return self._consumer

    @property
    def early_replies(self) -> EarlyReplyPort | None:
        """What LynxScheduler needs to answer prefills early; None on an instance without them."""
        return self._producer

    def on_new_request(self, request: "Request") -> None:
        if self._producer:
            self._producer.add(request)
        if self._consumer:
            self._consumer.add(request)

    def get_num_new_matched_tokens(
        self, request: "Request", num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        if self._producer and not self._producer.may_start(request):
            return None, False
        return self._consumer.match(request, num_computed_tokens) if self._consumer else (0, False)

    def update_state_after_alloc(
        self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int
    ) -> None:
        if self._consumer:
            self._consumer.allocated(request, blocks, num_external_tokens)

    def has_pending_push_work(self) -> bool:
        """Keeps the engine stepping while transfers have to be given back that it does not know
        yet, and at its end while staged tiers wait to be fetched."""
        if self._consumer is not None and self._consumer.has_orphans:
            return True
        return self._shutdown.serving and self._num_staged > 0

    @property
    def _num_staged(self) -> int:
        return self._producer.num_staged if self._producer else 0

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> LynxMetadata:
        metadata = LynxMetadata()
        if self._producer:
            self._producer.fill(metadata, scheduler_output)
        if self._consumer:
            self._consumer.fill(metadata, scheduler_output.num_scheduled_tokens)
        return metadata

    def update_connector_output(self, connector_output: "KVConnectorOutput") -> None:
        if self._consumer:
            self._consumer.received(connector_output.finished_recving or ())
        report = connector_output.kv_connector_worker_meta
        if not isinstance(report, LynxWorkerMetadata):
            return
        if self._producer:
            self._producer.update(report)
        if self._consumer:
            self._consumer.update(report)

    def request_finished(
        self, request: "Request", block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        delay, reply = self._producer.finish(request) if self._producer else (False, None)
        if self._consumer:
            self._consumer.finish(request)
        return delay, reply

    def set_xfer_handshake_metadata(
        self, metadata: dict[int, KVConnectorHandshakeMetadata]
    ) -> None:
        if self._producer:
            workers = [metadata[rank] for rank in sorted(metadata)]
            if not all(isinstance(worker, LynxHandshakeMetadata) for worker in workers):
                # MultiConnector passes on what the first of its connectors says.
                raise ConfigError(
                    f"{type(workers[0]).__name__} came in the place of LynxConnector's: name "
                    "LynxConnector first in MultiConnector's kv_connector_extra_config.connectors"
                )
            self._producer.set_workers([w.port for w in workers], [w.tables for w in workers])

    # ---- worker side --------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, "torch.Tensor"]) -> None:
        from vllm.distributed import (
            get_tensor_model_parallel_rank,
            get_tensor_model_parallel_world_size,
        )

        from lynx_connector.codec import KVGeometry
        from lynx_connector.consumer.worker import ConsumerWorker
        from lynx_connector.engine.kv_layout import build_paged_cache
        from lynx_connector.engine.worker_context import WorkerContext
        from lynx_connector.producer.worker import ProducerWorker
        from lynx_connector.transport.handshake import Identity
        from lynx_connector.transport.loop import TransportLoop

        config, vllm_config = self._config, self._vllm_config
        transfer = vllm_config.kv_transfer_config
        spec = self._kv_cache_config.kv_cache_groups[0].kv_cache_spec
        cache = build_paged_cache(
            kv_caches,
            block_size=spec.block_size,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_size,
            dtype=spec.dtype,
        )
        geometry = KVGeometry(
            len(kv_caches), spec.num_kv_heads, spec.head_size, str(spec.dtype).rsplit(".")[-1]
        )
        rank, tp_size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        identity = Identity(
            served.compatibility(vllm_config, config, dataclasses.asdict(geometry)),
            f"{transfer.engine_id}/{rank}",
            SharedSecrets(config.secret_file),
            config.encrypt,
        )
        self._loop = TransportLoop(config.ucx_tls, config.data_ports)
        self._loop.start()
        context = WorkerContext(
            config=config,
            identity=identity,
            tables_key=served.tables_key(vllm_config, config, dataclasses.asdict(geometry)),
            rank=rank,
            tensor_parallel_size=tp_size,
            port_offset=vllm_config.parallel_config.data_parallel_index * tp_size + rank,
            geometry=geometry,
            rotation=compat.key_rotation(geometry.head_dim),
            cache=cache,
            block_size=self._block_size,
            loop=self._loop,
            events=self._events,
            null_block=NULL_BLOCK,
            tap_queries=functools.partial(compat.tap_queries, vllm_config, list(kv_caches)),
        )
        if transfer.is_kv_producer:
            self._producer_worker = ProducerWorker(context)
        if transfer.is_kv_consumer:
            if self._speculative:
                compat.warm_up_verification(vllm_config, cache.device)
            self._consumer_worker = ConsumerWorker(
                dataclasses.replace(context, events=self._consumer_events)
            )

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        worker = self._producer_worker
        return LynxHandshakeMetadata(worker.port, worker.current) if worker else None

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        assert isinstance(kv_connector_metadata, LynxMetadata)
        if self._producer_worker:
            self._producer_worker.apply_drops(kv_connector_metadata)
            # vLLM's only call that comes before every forward pass.
            self._producer_worker.expect(kv_connector_metadata)
        if self._consumer_worker:
            self._consumer_worker.apply_cancellations(kv_connector_metadata)

    def start_load_kv(self, forward_context: "ForwardContext", **kwargs: Any) -> None:
        if self._consumer_worker:
            self._consumer_worker.step(self._get_connector_metadata())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: loads are asynchronous."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Nothing per layer: whole chunks are encoded after the forward pass."""

    def wait_for_save(self) -> None:
        if self._producer_worker:
            self._producer_worker.submit(self._get_connector_metadata())

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        results = KVConnectorTransferResults()
        if self._producer_worker:
            results.finished_sending = self._producer_worker.take_finished(finished_req_ids)
        if self._consumer_worker:
            results.finished_recving, results.failed_recving = self._consumer_worker.take_finished()
        return results

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        report = LynxWorkerMetadata()
        if self._consumer_worker:
            report = self._consumer_worker.take_report()
        if self._producer_worker:
            report.tables = self._producer_worker.take_report()
            report.link_mbit, report.step_ms = self._producer_worker.take_measured()
            report.unwanted = self._producer_worker.take_unwanted()
            report.dropped = self._producer_worker.take_dropped()
        return report if report else None

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        for role, worker in ((PRODUCER, self._producer_worker), (CONSUMER, self._consumer_worker)):
            if worker is not None:
                for name, value in worker.gauges().items():
                    self._meter.set(name, value, role, str(worker.rank))
        return LynxStats.take(self._meter)

    # ---- front end ----------------------------------------------------------------------------

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats:
        return LynxStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: "VllmConfig",
        metric_types: dict[type, type],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics:
        return LynxPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        if self._num_staged:
            logger.warning(
                "lynx: this prefill instance ends with %d transfers that nobody may have "
                "fetched; --shutdown-timeout gives decode instances time to",
                self._num_staged,
            )
        if self._bootstrap:
            self._bootstrap.stop()
        if self._consumer:
            self._consumer.stop()
        if self._producer_worker:
            self._producer_worker.stop()
        if self._consumer_worker or self._producer_worker:
            self._loop.stop()
        self._events.close()
        self._consumer_events.close()
