# SPDX-License-Identifier: Apache-2.0
"""Codecs by what a handoff names, built and compiled once."""

from __future__ import annotations

import threading
from collections import OrderedDict

from lynx_kernels.klt import cpu as klt_cpu
from lynx_kernels.shared.paged import PagedKVCache

from lynx_connector.codec import CODECS, Codec, CodecError, KltTables, KVGeometry, get_codec
from lynx_connector.codec.compiling import compiling
from lynx_connector.codec.exact import ExactTier
from lynx_connector.codec.klt import KltCodec
from lynx_connector.codec.types import DTYPES, RowLayout
from lynx_connector.config import DEFAULT_ANCHOR_BITS, FALLBACK_CODEC
from lynx_connector.wire.handoff import TABLE_CODECS

MAX_CODECS = 8
"""Codecs kept beyond the transfers that use them; one with tables holds those in memory."""


class CodecCache:
    """Codecs of one geometry, for one cache. Thread-safe."""

    def __init__(self, geometry: KVGeometry, cache: PagedKVCache | None = None):
        """`cache` is what kernels are compiled for; None: any in CPU memory."""
        self._geometry = geometry
        self._cache = cache
        self._codecs: OrderedDict[tuple[str, int, str], Codec] = OrderedDict()
        self._warm: set[tuple[str, int]] = set()
        self._lock = threading.Lock()
        self._compiling = threading.Lock()

    def get(
        self, name: str, anchor_bits: int = DEFAULT_ANCHOR_BITS, tables: KltTables | None = None
    ) -> Codec:
        """The codec, its kernels compiled.

        Raises:
            CodecError: it does not exist, or does not fit geometry or tables.
        """
        key = (name, anchor_bits, tables.digest if tables else "")
        with self._lock:
            if key in self._codecs:
                self._codecs.move_to_end(key)
                return self._codecs[key]
        codec = get_codec(name, self._geometry, anchor_bits=anchor_bits, tables=tables)
        with self._compiling:  # takes seconds: whoever asks for another codec must not wait
            if (name, anchor_bits) not in self._warm:
                with compiling(self._named(f"codec {name}")):
                    codec.warmup(self._cache)
                self._warm.add((name, anchor_bits))
        with self._lock:
            self._codecs[key] = codec
            while len(self._codecs) > MAX_CODECS:
                self._codecs.popitem(last=False)
            return codec

    def compile_exact(self) -> None:
        """Compile what the exact tier needs, of whatever codec."""
        if self._cache is not None:
            tier = ExactTier(self.get(FALLBACK_CODEC))
            with compiling(self._named("the exact tier")):
                tier.warmup(self._cache)

    def compile_ahead(self) -> None:
        """Compile what codecs with tables need before there are any: all of it on a CPU (seconds
        when not cached), nothing on a GPU, where tables are arguments of what is compiled."""
        if self._cache is None or self._cache.device.type == "cpu":
            with compiling(self._named("codec klt")):
                klt_cpu.compile_kernels(DTYPES[self._geometry.dtype].itemsize)

    def _named(self, what: str) -> str:
        return f"{what}, head size {self._geometry.head_dim}, {self._geometry.dtype}"

    def layout(self, name: str, anchor_bits: int) -> Codec | RowLayout:
        """The codec itself, or its row widths alone where it needs tables that are not here yet.

        Raises:
            CodecError: as `get`.
        """
        if name not in TABLE_CODECS:
            return self.get(name, anchor_bits)
        if name not in CODECS:
            raise CodecError(f"unknown codec {name!r}; known codecs: {', '.join(CODECS)}")
        return RowLayout(name, KltCodec.row_widths(self._geometry, anchor_bits))
