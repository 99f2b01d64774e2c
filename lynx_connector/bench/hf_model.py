# SPDX-License-Identifier: Apache-2.0
"""A model folder run by transformers: its KV tensors, its answers, its logits on a degraded cache.

Everything is computed in float32; the KV cache alone is rounded to the cache's dtype, as vLLM
stores it (K after RoPE). KV is passed around as values [T, L, 2, H, D], the codecs' order.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lynx_kernels.shared.rotation import NO_ROTATION, Rotation, fit_rotation

from lynx_connector.bench.errors import BenchError
from lynx_connector.codec.query_energy import QUERY_STRIDE
from lynx_connector.codec.types import DTYPES, KVGeometry


@dataclass(frozen=True)
class Past:
    """A cache to begin with, as transformers holds it, with room behind it.

    buffers: per layer K and V, float32 [1, H, length + room, D]. A forward pass writes into the
    room only, so that one `Past` serves any number of passes, one after the other.
    """

    buffers: list[tuple[torch.Tensor, torch.Tensor]]
    length: int


def check_folder(folder: Path) -> None:
    """Raises BenchError unless `folder` holds a model (configuration, tokenizer and weights)."""
    if not folder.is_dir():
        raise BenchError(f"model {folder}: no such folder")
    if not (folder / "config.json").is_file():
        raise BenchError(f"model {folder}: the folder has no config.json")
    if not any([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        raise BenchError(f"model {folder}: the folder has no weights (*.safetensors)")


def load_config(model: str, revision: str | None = None) -> Any:
    """A model's text configuration. Raises BenchError, naming what is missing."""
    from transformers import AutoConfig

    _check_name(model)
    with _errors_of(model):
        return AutoConfig.from_pretrained(model, revision=revision).get_text_config()


class HFModel:
    """One causal language model on the CPU.

    name: a model folder, or a hub name with its revision; dtype: of the cache, a key of `DTYPES`.
    Raises BenchError, naming what is missing.
    """

    def __init__(
        self, name: str | Path, dtype: str = "bfloat16", revision: str | None = None
    ) -> None:
        if dtype not in DTYPES:
            raise BenchError(f"--dtype {dtype} is not one of {', '.join(DTYPES)}")
        self.name, self.dtype, self.revision = str(name), dtype, revision
        _check_name(self.name)
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        with _errors_of(self.name):
            self.tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
            self.model = AutoModelForCausalLM.from_pretrained(
                name, revision=revision, dtype=torch.float32
            ).eval()
        # Texts longer than a model's limit are cut; transformers need not warn of them.
        self.tokenizer.model_max_length = int(1e9)
        self.config = self.model.config.get_text_config()
        probe = self._forward([0], None)[1]
        shapes = {tuple(part.shape[1::2]) for layer in probe for part in layer}
        if len(shapes) != 1:
            raise BenchError(f"model {name}: its layers differ in KV heads or head size")
        heads, head_dim = next(iter(shapes))
        self.geometry = KVGeometry(len(probe), heads, head_dim, dtype)

    @functools.cached_property
    def rotation(self) -> Rotation:
        """What the model does to K by its position; NO_ROTATION where that is not known."""
        module = next(
            (m for name, m in self.model.named_modules() if name.endswith("rotary_emb")), None
        )
        if module is None:
            return NO_ROTATION
        positions = torch.arange(min(self.positions, 1 << 15))
        cos, sin = module(torch.zeros(1, 1, 1), positions[None])
        half = cos.shape[-1] // 2
        table = torch.cat((cos[0, :, :half], sin[0, :, :half]), dim=-1)
        return fit_rotation(table, is_neox=True) or NO_ROTATION

    @property
    def positions(self) -> int:
        """Longest sequence that the model was made for."""
        return int(getattr(self.config, "max_position_embeddings", None) or 1 << 30)

    def check_length(self, tokens: int) -> None:
        """Raises BenchError where `tokens` positions are more than the model was made for."""
        if tokens > self.positions:
            raise BenchError(
                f"a prompt and its answer take {tokens} tokens, model {self.name} has "
                f"{self.positions} positions: fewer tokens of each text are needed"
            )

    def prefill(self, ids: Sequence[int], prefix: torch.Tensor | None = None) -> torch.Tensor:
        """KV of `ids`, which follow the tokens of `prefix`: [len(ids), L, 2, H, D], cache dtype."""
        past = None if prefix is None else make_past(prefix, room=len(ids))
        start = 0 if past is None else past.length
        _, kv = self._forward(list(ids), past, logits=1)
        return _values([(k[:, :, start:], v[:, :, start:]) for k, v in kv], self.dtype)

    def prefill_for_learning(self, ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """As `prefill`, and queries before RoPE: [len(ids) / QUERY_STRIDE, L, query heads, D].

        None of them (length 0) where K's rotation is not known, or the model has no projection of
        its own for queries.
        """
        seen: list[torch.Tensor] = []

        def keep(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
            rows = output.reshape(len(ids), -1, self.geometry.head_dim)
            seen.append(rows[::QUERY_STRIDE].clone())

        handles = [module.register_forward_hook(keep) for module in self._query_modules]
        try:
            values = self.prefill(ids)
        finally:
            for handle in handles:
                handle.remove()
        if len(seen) != self.geometry.num_layers:
            return values, torch.empty(0, self.geometry.num_layers, 0, self.geometry.head_dim)
        return values, torch.stack(seen, dim=1)

    @functools.cached_property
    def _query_modules(self) -> list[torch.nn.Module]:
        """What gives each layer's queries as RoPE gets them."""
        if not self.rotation.pairs:
            return []
        for name in ("q_norm", "q_proj"):
            if found := [m for n, m in self.model.named_modules() if n.endswith("." + name)]:
                return found
        return []

    def greedy(
        self,
        past: Past,
        last: int,
        count: int,
        before: Callable[[int], None] = lambda token: None,
    ) -> list[int]:
        """`count` greedy tokens after a cache and the prompt's last token, end tokens included.

        The cache needs room for all of them. `before` is called with each token's number before it
        is computed, and may write into the cache.
        """
        cache = _make_cache(past)
        tokens: list[int] = []
        with torch.inference_mode():
            for number in range(count):
                before(number)
                ids = torch.tensor([[last]])
                output = self.model(input_ids=ids, past_key_values=cache, use_cache=True)
                last = int(output.logits[0, -1].argmax())
                tokens.append(last)
        return tokens

    def logits(self, past: Past, ids: Sequence[int]) -> torch.Tensor:
        """Logits float32 [len(ids), vocabulary] of `ids` after a cache, in one forward pass."""
        return self._forward(list(ids), past)[0]

    def _forward(
        self, ids: list[int], past: Past | None, logits: int = 0
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """Logits (of the last `logits` tokens; 0: of all), and all K and V afterwards."""
        cache = _make_cache(past)
        with torch.inference_mode():
            output = self.model(
                input_ids=torch.tensor([ids]),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=logits,
            )
        layers = [(layer.keys, layer.values) for layer in cache.layers]
        return output.logits[0].float(), layers


def make_past(*parts: torch.Tensor, room: int) -> Past:
    """Values [T, L, 2, H, D] of runs of tokens that follow each other, as one cache."""
    length = sum(map(len, parts))
    _, layers, _, heads, head_dim = parts[0].shape
    buffers = torch.empty(layers, 2, 1, heads, length + room, head_dim)
    start = 0
    for part in parts:
        buffers[:, :, 0, :, start : start + len(part)] = part.permute(1, 2, 3, 0, 4)
        start += len(part)
    return Past([(k, v) for k, v in buffers], length)


def _values(layers: list[tuple[torch.Tensor, torch.Tensor]], dtype: str) -> torch.Tensor:
    """K and V [1, H, T, D] of every layer as [T, L, 2, H, D], rounded to the cache's dtype."""
    _, heads, tokens, head_dim = layers[0][0].shape
    values = torch.empty(tokens, len(layers), 2, heads, head_dim, dtype=DTYPES[dtype])
    for layer, pair in enumerate(layers):
        for which, part in enumerate(pair):
            values[:, layer, which] = part[0].transpose(0, 1)
    return values


def _make_cache(past: Past | None) -> Any:
    """A transformers cache that begins with `past`, without copying it."""
    from transformers import DynamicCache

    cache = DynamicCache()
    if past is not None:
        layer_class = _room_layer()
        cache.layers = [layer_class(k, v, past.length) for k, v in past.buffers]
    return cache


@functools.cache
def _room_layer() -> Any:
    from transformers.cache_utils import DynamicLayer

    class RoomLayer(DynamicLayer):
        """Writes behind the past; the stock layer copies all of it for every token."""

        def __init__(self, keys: torch.Tensor, values: torch.Tensor, length: int) -> None:
            super().__init__()
            self._room = keys, values
            self.lazy_initialization(keys, values)
            self._show(length)

        def _show(self, length: int) -> None:
            self.keys, self.values = (buffer[:, :, :length] for buffer in self._room)

        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            start = self.keys.shape[-2]
            end = start + key_states.shape[-2]
            for buffer, new in zip(self._room, (key_states, value_states), strict=True):
                buffer[:, :, start:end] = new
            self._show(end)
            return self.keys, self.values

    return RoomLayer


def _check_name(name: str) -> None:
    """Check what is a folder, or cannot be a hub's `organisation/name`."""
    if Path(name).is_dir() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        check_folder(Path(name))


@contextlib.contextmanager
def _errors_of(model: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise BenchError(f"model {model}: {str(error).strip().splitlines()[0]}") from None
