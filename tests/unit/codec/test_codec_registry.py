# SPDX-License-Identifier: Apache-2.0
"""Registry, sizes on the wire, and what geometry a codec refuses."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lynx_connector.codec import CODECS, CodecError, KVGeometry, Tier, get_codec

SMOL = KVGeometry(num_layers=30, num_kv_heads=3, head_dim=64, dtype="bfloat16")


@pytest.mark.parametrize(
    ("name", "anchor", "total"),
    [("hadamard", 4.125, 8.125), ("int8", 8.25, 8.25), ("int4", 4.25, 4.25), ("bf16", 16, 16)],
)
def test_bits_per_element(name: str, anchor: float, total: float) -> None:
    codec = get_codec(name, SMOL)
    assert codec.bits_per_element([Tier.ANCHOR]) == anchor
    assert codec.bits_per_element() == total


def test_tier_sizes_of_the_small_model() -> None:
    assert SMOL.elements_per_token == 11520
    codec = get_codec("hadamard", SMOL)
    assert codec.bytes_per_token(Tier.ANCHOR) == 11520 // 2 + 180
    assert codec.bytes_per_token(Tier.RESIDUAL) == 11520 // 2
    assert get_codec("bf16", SMOL).bytes_per_token(Tier.ANCHOR) == 23040


def test_names_match_their_classes() -> None:
    assert all(codec.name == name for name, codec in CODECS.items())
    assert all(codec.tiers[0] is Tier.ANCHOR for codec in CODECS.values())


def test_unknown_codec_lists_the_known_ones() -> None:
    with pytest.raises(CodecError, match=r"'zip'.*hadamard, bf16, int8, int4"):
        get_codec("zip", SMOL)


@pytest.mark.parametrize("name", CODECS)
def test_unsupported_geometry_is_named(name: str) -> None:
    with pytest.raises(CodecError, match="float8"):
        get_codec(name, KVGeometry(1, 1, 64, "float8_e4m3fn"))
    with pytest.raises(CodecError, match="num_kv_heads 0"):
        get_codec(name, KVGeometry(1, 0, 64, "bfloat16"))


@pytest.mark.parametrize("name", ["hadamard", "int8", "int4"])
def test_the_head_dim_that_cannot_be_encoded_is_named(name: str) -> None:
    with pytest.raises(CodecError, match="head_dim 100 is not a multiple of 8"):
        get_codec(name, KVGeometry(1, 1, 100, "bfloat16"))


def test_codecs_import_without_vllm() -> None:
    code = "import sys, lynx_connector.codec; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
