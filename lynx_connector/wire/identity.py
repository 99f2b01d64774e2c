# SPDX-License-Identifier: Apache-2.0
"""What both sides must share for KV to be interchangeable. Imports neither torch nor vLLM.

Three short hashes, so that a refusal can say what differs: the weights, the configuration that
vLLM made of config.json and its flags, and the cache's shape.
"""

import enum
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lynx_connector.errors import ConfigError
from lynx_connector.wire.messages import PROTOCOL_VERSION

_PARTS = {
    "model": "another model (its weights: serve the same files, or set one model_id)",
    "config": "another model configuration (--hf-overrides, --quantization, --dtype, config.json)",
    "cache": "another cache dtype, shape or --tensor-parallel-size",
}
_COMPAT = re.compile("".join(rf"\|?{part}:([0-9a-f]{{16}})" for part in _PARTS) + r"\Z")

_SAMPLE = 1 << 16
_STRIDE = 16 << 20
_MOST_SAMPLES = 256

_NEVER_WEIGHTS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")

# What changes nothing in the KV of a prompt, or repeats what is compared elsewhere.
_NO_MATTER = {
    "_attn_implementation",
    "_commit_hash",
    "_name_or_path",
    "attention_dropout",
    "attn_implementation",
    "auto_map",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "id2label",
    "initializer_range",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


def compatibility(model: str, config: Mapping[str, Any], cache: Mapping[str, Any]) -> str:
    """`model:...|config:...|cache:...`, 16 hex digits each: what peers compare.

    model: `model_identity`; config: what the instance serves, `clean`ed; cache: the worker's
    KVGeometry and the tensor parallel size. Block sizes may differ: frames are runs of tokens.
    """
    parts = (model, clean(config), clean(cache))
    return "|".join(
        f"{name}:{_digest(part)[:16]}" for name, part in zip(_PARTS, parts, strict=True)
    )


def difference(own: str, peer: str) -> str:
    """In which way another worker's `compatibility` differs, with the remedy; empty: it does not.

    At most 240 characters, whatever the peer says.
    """
    if own == peer:
        return ""
    here, there = _COMPAT.match(own), _COMPAT.match(peer)
    if here is None or there is None:
        return "another model, cache dtype or tensor parallel size: serve the same on both sides"
    pairs = zip(_PARTS.values(), here.groups(), there.groups(), strict=True)
    return "; ".join(text for text, one, other in pairs if one != other)


def tables_key(
    model: str,
    tensor_parallel_size: int,
    geometry: Mapping[str, Any],
    *,
    revision: str | None = None,
    model_id: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> str:
    """Folder name of a model's learned tables: 32 hex digits, the same for a producer and for
    `lynx calibrate`, which knows only what it is told.

    Tables of another model would be used correctly and serve badly, so that this need not be as
    strict as `compatibility`. geometry: `dataclasses.asdict` of the worker's KVGeometry;
    overrides: vLLM's hf_overrides.
    """
    parts = {
        "protocol": PROTOCOL_VERSION,
        "model": model_identity(model, revision, model_id),
        "config": "" if model_id is not None else _config_file(Path(model)),
        "tensor_parallel_size": tensor_parallel_size,
        "cache": geometry,
        **({"overrides": overrides} if overrides else {}),
    }
    return _digest(clean(parts))[:32]


def model_identity(
    model: str, revision: str | None = None, model_id: str | None = None, *, code: bool = False
) -> str:
    """Names the weights: `model_id` if configured; else a fingerprint of a local file or folder,
    or hub name and revision.

    code: the folder's Python files belong to the model (trust_remote_code).

    Raises:
        ConfigError: a file cannot be read.
    """
    if model_id is not None:
        return model_id
    path = Path(model)
    try:
        if path.is_dir():
            return _fingerprint(_weights(path), _python(path) if code else [])
        if path.is_file():  # GGUF
            return _fingerprint([path], [])
    except OSError as error:
        raise ConfigError(
            f"model {model}: cannot be compared with the other side's: {error}; set model_id in "
            "kv_connector_extra_config on both sides"
        ) from None
    return f"{model}@{revision or 'main'}"


def _weights(folder: Path) -> list[Path]:
    """What vLLM would load: safetensors, else PyTorch files, else whatever is neither text nor
    hidden; with them the index of shards."""
    files = [path for path in folder.iterdir() if path.is_file() and path.name[0] != "."]
    files = [path for path in files if not path.name.startswith(_NEVER_WEIGHTS)]
    for suffixes in ((".safetensors",), (".bin",), (".pt", ".pth")):
        if found := [path for path in files if path.suffix in suffixes]:
            break
    else:
        text = (".json", ".jsonl", ".txt", ".md", ".jinja", ".py", ".model", ".tiktoken", ".lock")
        found = [path for path in files if path.suffix not in text]
    return found + [path for path in files if path.name.endswith(".index.json")]


def _python(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*.py") if path.is_file()]


def _fingerprint(weights: list[Path], code: list[Path]) -> str:
    """sha256 over names, sizes and samples of the files; over all of the code.

    Reading whole files would cost minutes. Samples are their two ends and a page every 16 MiB, so
    that an edit of a single layer is noticed, too.
    """
    digest = hashlib.sha256()
    for path in sorted(weights, key=lambda path: path.name):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size};".encode(errors="surrogateescape"))
        with path.open("rb") as file:
            for start, length in _samples(size):
                file.seek(start, os.SEEK_SET)
                digest.update(file.read(length))
    for path in sorted(code, key=lambda path: path.parts):
        digest.update(path.name.encode(errors="surrogateescape") + path.read_bytes())
    return digest.hexdigest()[:32]


def _samples(size: int) -> Iterator[tuple[int, int]]:
    """(start, length) of what is read of a file."""
    yield 0, min(size, _SAMPLE)
    stride = max(_STRIDE, size // _MOST_SAMPLES)
    for start in range(stride, size - _SAMPLE, stride):
        yield start, 4096
    if size > _SAMPLE:
        yield max(_SAMPLE, size - _SAMPLE), _SAMPLE


def _config_file(model: Path) -> str:
    try:
        return hashlib.sha256((model / "config.json").read_bytes()).hexdigest()
    except OSError:
        return ""


def hf_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """A model configuration without what does not matter, at any depth."""
    return {
        key: hf_config(value)
        if isinstance(value, Mapping) and key != "quantization_config"
        else value
        for key, value in values.items()
        if key not in _NO_MATTER
    }


def clean(value: Any) -> Any:
    """A value as JSON, alike in every process: no memory addresses, and a null is as good as
    nothing."""
    if isinstance(value, enum.Enum):
        return clean(value.value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        pairs = ((str(key), clean(item)) for key, item in value.items())
        return {key: item for key, item in pairs if item is not None}
    if isinstance(value, set | frozenset):
        return sorted(map(clean, value), key=str)
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    if callable(value):
        return f"{value.__module__}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    text = str(value)
    return text if " at 0x" not in text else type(value).__qualname__


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
