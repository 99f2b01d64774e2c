# SPDX-License-Identifier: Apache-2.0
"""What both sides must share for KV to be interchangeable. Imports neither torch nor vLLM."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from lynx_connector.wire.messages import PROTOCOL_VERSION


def compatibility_hash(
    model: str,
    tensor_parallel_size: int,
    geometry: dict[str, Any],
    *,
    revision: str | None = None,
    model_id: str | None = None,
) -> str:
    """32 hex digits over protocol version, model, the cache's dtype and the worker's shard.

    model: folder or hub name as given to vLLM; geometry: `dataclasses.asdict` of the worker's
    KVGeometry. Block sizes may differ, since frames are runs of tokens.
    """
    parts = {
        "protocol": PROTOCOL_VERSION,
        "model": model_identity(model, revision, model_id),
        "tensor_parallel_size": tensor_parallel_size,
        "cache": geometry,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def model_identity(model: str, revision: str | None, model_id: str | None) -> str:
    """`model_id` if configured; else a fingerprint of a local folder, or hub name and revision."""
    if model_id is not None:
        return model_id
    folder = Path(model)
    if not folder.is_dir():
        return f"{model}@{revision or 'main'}"
    return _folder_fingerprint(folder)


def _folder_fingerprint(folder: Path, sample: int = 1 << 16) -> str:
    """sha256 over config.json and, per weights file, its size and its two ends.

    Two fine-tunes of one architecture differ in their last bytes; reading whole files would cost
    minutes.
    """
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("config.json"), *folder.glob("*.safetensors")]):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size};".encode())
        with path.open("rb") as file:
            digest.update(file.read(sample))
            if size > sample:
                file.seek(-min(sample, size - sample), os.SEEK_END)
                digest.update(file.read(sample))
    return digest.hexdigest()[:32]
