# SPDX-License-Identifier: Apache-2.0
"""Round trips of every message, and refusal of everything that is not one."""

import contextlib
import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lynx_connector.errors import ProtocolError
from lynx_connector.wire import messages

MESSAGES = [
    messages.Hello(1, "0.1.0", "c" * 32, "engine/0", b"n" * 32),
    messages.Welcome(1, "0.1.0", "c" * 32, "engine/0", b"n" * 32, b"p" * 32, "d" * 32),
    messages.Proof(b""),
    messages.Ready(),
    messages.Refused("why"),
    messages.Fetch("id", 0, 4096),
    messages.Hold(["t", "u"]),
    messages.Release("id", "done"),
    messages.Failure("id", "unknown transfer"),
    messages.Prefilled("id", 49151),
    messages.Prefilling(),
    messages.Prefilled("id", None, "aborted"),
    messages.TablesRequest("0" * 32),
    messages.Tables("0" * 32, 1 << 20, 2**64 - 1),
    messages.NoTables("0" * 32, "unknown"),
    messages.Frame("id", 1, "hadamard", 1, 128, 4096, 2**64 - 1),
    messages.Frame("id", 0, "klt", 1, 128, 4096, 2**64 - 1, 7),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_round_trip(message):
    slot = messages.encode(message)
    assert len(slot) == messages.SLOT_BYTES
    assert messages.decode(slot) == message


def test_every_message_is_covered():
    assert {type(m) for m in MESSAGES} == set(messages.AnyMessage.__args__)


@given(st.binary(max_size=messages.SLOT_BYTES))
def test_noise_is_refused(noise):
    slot = noise.ljust(messages.SLOT_BYTES, b"\0")
    if not slot.startswith(b"LYNX"):
        with pytest.raises(ProtocolError):
            messages.decode(slot)


@given(st.binary(max_size=900), st.integers(0, 2**32 - 1))
def test_noise_behind_a_valid_prefix_never_escapes_as_another_error(noise, length):
    slot = (struct.pack("<4sI", b"LYNX", length) + noise).ljust(messages.SLOT_BYTES, b"\0")
    with contextlib.suppress(ProtocolError):
        assert isinstance(messages.decode(slot), messages.Message)


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
    slot = (struct.pack("<4sI", b"LYNX", len(body)) + body).ljust(messages.SLOT_BYTES, b"\0")
    with pytest.raises(ProtocolError, match="malformed"):
        messages.decode(slot)


@pytest.mark.parametrize(
    "digest", ["", "0" * 31, "0" * 33, "../" + "0" * 29, "A" * 32, "0" * 32 + "\n"]
)
def test_digests_are_32_hex_digits_and_nothing_else(digest):
    body = msgspec.msgpack.encode({"type": "TablesRequest", "digest": digest})
    slot = (struct.pack("<4sI", b"LYNX", len(body)) + body).ljust(messages.SLOT_BYTES, b"\0")
    with pytest.raises(ProtocolError, match="malformed"):
        messages.decode(slot)


def test_oversized_message_is_not_sent():
    with pytest.raises(ProtocolError, match="exceeds a slot"):
        messages.encode(messages.Refused("x" * 2000))
