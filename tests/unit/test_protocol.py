# SPDX-License-Identifier: Apache-2.0
"""Round trips of every message, and refusal of everything that is not one."""

import contextlib
import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lynx_connector import protocol
from lynx_connector.errors import ProtocolError

MESSAGES = [
    protocol.Hello(1, "0.1.0", "c" * 32, "engine/0", b"n" * 32),
    protocol.Welcome(1, "0.1.0", "c" * 32, "engine/0", b"n" * 32, b"p" * 32, "d" * 32),
    protocol.Proof(b""),
    protocol.Ready(),
    protocol.Refused("why"),
    protocol.Fetch("id", 0, 4096),
    protocol.Release("id", "done"),
    protocol.Failure("id", "unknown transfer"),
    protocol.Prefilled("id", 49151),
    protocol.Prefilling(),
    protocol.Prefilled("id", None, "aborted"),
    protocol.TablesRequest("0" * 32),
    protocol.Tables("0" * 32, 1 << 20, 2**64 - 1),
    protocol.NoTables("0" * 32, "unknown"),
    protocol.Frame("id", 1, "hadamard", 1, 128, 4096, 2**64 - 1),
    protocol.Frame("id", 0, "klt", 1, 128, 4096, 2**64 - 1, 7),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_round_trip(message):
    slot = protocol.encode(message)
    assert len(slot) == protocol.SLOT_BYTES
    assert protocol.decode(slot) == message


def test_every_message_is_covered():
    assert {type(m) for m in MESSAGES} == set(protocol.AnyMessage.__args__)


@given(st.binary(max_size=protocol.SLOT_BYTES))
def test_noise_is_refused(noise):
    slot = noise.ljust(protocol.SLOT_BYTES, b"\0")
    if not slot.startswith(b"LYNX"):
        with pytest.raises(ProtocolError):
            protocol.decode(slot)


@given(st.binary(max_size=900), st.integers(0, 2**32 - 1))
def test_noise_behind_a_valid_prefix_never_escapes_as_another_error(noise, length):
    slot = (struct.pack("<4sI", b"LYNX", length) + noise).ljust(protocol.SLOT_BYTES, b"\0")
    with contextlib.suppress(ProtocolError):
        assert isinstance(protocol.decode(slot), protocol.Message)


@pytest.mark.parametrize(
    "fields",
    [
        {"tier": 3},
        {"num_tokens": 0},
        {"num_bytes": 2**31},
        {"first_token": -1},
        {"transfer_id": ""},
        {"extra": 1},
        {"codec": "x" * 200},
        {"exceptions": -1},
        {"exceptions": 1 << 40},
    ],
)
def test_out_of_range_frames_are_refused(fields):
    good = {
        "type": "Frame",
        "transfer_id": "id",
        "tier": 0,
        "codec": "bf16",
        "first_token": 0,
        "num_tokens": 1,
        "num_bytes": 2,
        "checksum": 0,
    }
    body = msgspec.msgpack.encode(good | fields)
    slot = (struct.pack("<4sI", b"LYNX", len(body)) + body).ljust(protocol.SLOT_BYTES, b"\0")
    with pytest.raises(ProtocolError, match="malformed"):
        protocol.decode(slot)


@pytest.mark.parametrize(
    "digest", ["", "0" * 31, "0" * 33, "../" + "0" * 29, "A" * 32, "0" * 32 + "\n"]
)
def test_digests_are_32_hex_digits_and_nothing_else(digest):
    body = msgspec.msgpack.encode({"type": "TablesRequest", "digest": digest})
    slot = (struct.pack("<4sI", b"LYNX", len(body)) + body).ljust(protocol.SLOT_BYTES, b"\0")
    with pytest.raises(ProtocolError, match="malformed"):
        protocol.decode(slot)


def test_oversized_message_is_not_sent():
    with pytest.raises(ProtocolError, match="exceeds a slot"):
        protocol.encode(protocol.Refused("x" * 2000))
