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
    messages.Welcome(1, "0.1.0", "c" * 32, "engine/0", b"n" * 32, b"p" * 32),
    messages.Proof(b""),
    messages.Ready(b"a" * 2000, b"t" * 8, "20000-20063", "d" * 32),
    messages.Join(b"a" * 2000, b"t" * 8),
    messages.Joined(),
    messages.Refused("why"),
    messages.Fetch("id", 0, 4096),
    messages.Hold(["t", "u"]),
    messages.Release("id", "done"),
    messages.Failure("id", "unknown transfer"),
    messages.Prefilled("id", 49151),
    messages.Prefilling(),
    messages.Sent("t"),
    messages.Taken(),
    messages.Prefilled("id", None, "aborted"),
    messages.TablesRequest("0" * 32),
    messages.Tables("0" * 32, 1 << 20, 2**64 - 1),
    messages.NoTables("0" * 32, "unknown"),
    messages.Frame("id", 1, "hadamard", 1, 128, 4096, 2**64 - 1),
    messages.Frame("id", 0, "klt", 1, 128, 4096, 2**64 - 1, 7),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_round_trip(message):
    body = messages.encode(message)
    assert messages.length_of(messages.prefix(len(body)), messages.MESSAGE_BYTES) == len(body)
    assert messages.decode(body) == message


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_only_worker_addresses_need_more_than_a_greeting(message):
    small = len(messages.encode(message)) <= messages.GREETING_BYTES
    assert small is not isinstance(message, messages.Ready | messages.Join)


def test_every_message_is_covered():
    assert {type(m) for m in MESSAGES} == set(messages.AnyMessage.__args__)


@given(st.binary(min_size=8, max_size=8))
def test_prefix_of_a_stranger_is_refused(noise):
    if not noise.startswith(b"LYNX"):
        with pytest.raises(ProtocolError, match="not a Lynx message"):
            messages.length_of(noise, messages.GREETING_BYTES)


@given(st.integers(messages.GREETING_BYTES + 1, 2**32 - 1))
def test_prefix_that_announces_too_much_is_refused(length):
    with pytest.raises(ProtocolError, match="claims"):
        messages.length_of(struct.pack("<4sI", b"LYNX", length), messages.GREETING_BYTES)


@given(st.binary(max_size=900))
def test_noise_behind_a_valid_prefix_never_escapes_as_another_error(noise):
    with contextlib.suppress(ProtocolError):
        assert isinstance(messages.decode(noise), messages.Message)


def test_hello_of_a_later_version_still_tells_its_version():
    body = msgspec.msgpack.encode(
        msgspec.msgpack.decode(messages.encode(messages.Hello(99, "9.9", "c", "p", b"n")))
        | {"invented": [1, 2]}
    )
    assert messages.decode(body).version == 99


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
    with pytest.raises(ProtocolError, match="malformed"):
        messages.decode(body)


@pytest.mark.parametrize(
    "digest", ["", "0" * 31, "0" * 33, "../" + "0" * 29, "A" * 32, "0" * 32 + "\n"]
)
def test_digests_are_32_hex_digits_and_nothing_else(digest):
    body = msgspec.msgpack.encode({"type": "TablesRequest", "digest": digest})
    with pytest.raises(ProtocolError, match="malformed"):
        messages.decode(body)


def test_oversized_message_is_not_sent():
    with pytest.raises(ProtocolError, match="at most 1024"):
        messages.encode(messages.Refused("x" * 2000))
