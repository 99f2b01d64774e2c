# SPDX-License-Identifier: Apache-2.0
"""What the two worker halves of one process share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lynx_kernels.shared.paged import PagedKVCache
from lynx_kernels.shared.rotation import Rotation

from lynx_connector.codec import KVGeometry
from lynx_connector.config import LynxConfig
from lynx_connector.telemetry.events import EventLog
from lynx_connector.transport.handshake import Identity
from lynx_connector.transport.loop import TransportLoop


@dataclass(frozen=True)
class WorkerContext:
    """One worker's configuration, identity, cache and transport."""

    config: LynxConfig
    identity: Identity
    tables_key: str
    """Folder of this model's learned tables, below `tables_dir`."""
    rank: int
    """Tensor parallel rank; fetches from the producer's worker of the same rank."""
    tensor_parallel_size: int
    port_offset: int
    """Of this worker among all of its deployment's: added to a fixed `listen_port`."""
    geometry: KVGeometry
    rotation: Rotation
    """What the codec klt rotates K back by; NO_ROTATION where it is not known."""
    cache: PagedKVCache
    block_size: int
    """vLLM's block size in tokens."""
    loop: TransportLoop
    events: EventLog
    null_block: int | None = None
    """Block that belongs to nobody and must not be touched; None where every block is somebody's.
    """
    tap_queries: Callable[[Callable[[int, Any, Any], None]], Callable[[], None]] | None = None
    """Shows attention's queries, as `QuerySampler` wants; None where nothing can."""
