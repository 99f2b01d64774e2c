# SPDX-License-Identifier: Apache-2.0
"""Codecs: how KV becomes tiers of bytes. Adding one means one file here and one entry below."""

from __future__ import annotations

from lynx_connector.codec.base import Codec, CodecError, KVGeometry, Tier
from lynx_connector.codec.hadamard import HadamardCodec
from lynx_connector.codec.raw import RawCodec
from lynx_connector.codec.uniform import Int4Codec, Int8Codec

CODECS: dict[str, type[Codec]] = {
    codec.name: codec for codec in (HadamardCodec, RawCodec, Int8Codec, Int4Codec)
}


def get_codec(name: str, geometry: KVGeometry) -> Codec:
    """The codec registered as `name`, for `geometry`.

    Raises CodecError for an unknown name (listing the known ones) or an unsupported geometry.
    """
    if name not in CODECS:
        raise CodecError(f"unknown codec {name!r}; known codecs: {', '.join(CODECS)}")
    return CODECS[name](geometry)


__all__ = ["CODECS", "Codec", "CodecError", "KVGeometry", "Tier", "get_codec"]
