# SPDX-License-Identifier: Apache-2.0
"""Codecs: how KV becomes tiers of bytes. Adding one means one file here and one entry below."""

from __future__ import annotations

from lynx_connector.codec.base import Codec
from lynx_connector.codec.hadamard import HadamardCodec
from lynx_connector.codec.klt import KltCodec
from lynx_connector.codec.klt_tables import KltTables
from lynx_connector.codec.raw import RawCodec
from lynx_connector.codec.types import CodecError, KVGeometry, Tier
from lynx_connector.codec.uniform import Int4Codec, Int8Codec

CODECS: dict[str, type[Codec]] = {
    codec.name: codec for codec in (KltCodec, HadamardCodec, RawCodec, Int8Codec, Int4Codec)
}
"""Codecs by name."""

DEFAULT_ANCHOR_BITS = 4


def get_codec(
    name: str,
    geometry: KVGeometry,
    *,
    anchor_bits: int = DEFAULT_ANCHOR_BITS,
    tables: KltTables | None = None,
) -> Codec:
    """The codec registered as `name`, for `geometry`.

    anchor_bits and tables matter to `klt` alone. Raises CodecError for an unknown name (listing
    the known ones), an unsupported geometry, or `klt` without tables.
    """
    if name not in CODECS:
        raise CodecError(f"unknown codec {name!r}; known codecs: {', '.join(CODECS)}")
    if name == KltCodec.name:
        return KltCodec(geometry, tables, anchor_bits)
    return CODECS[name](geometry)


__all__ = ["CODECS", "Codec", "CodecError", "KVGeometry", "KltTables", "Tier", "get_codec"]
