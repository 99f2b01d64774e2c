# SPDX-License-Identifier: Apache-2.0
"""Refusals of handoffs name the field, its value and what is accepted."""

import pytest

from lynx_connector.errors import MalformedError, ProtocolError
from lynx_connector.wire.handoff import (
    check_transfer_id,
    parse_handoff,
    parse_mooncake_leg,
    whereabouts,
)
from tests.unit.objects import handoff

NESTED: list = []
for _ in range(100_000):
    NESTED = [NESTED]

CASES = [
    ({"remote_host": None}, "remote_host = None: expected str, got null"),
    ({"remote_host": "a b"}, "remote_host = 'a b': expected a host name or address"),
    ({"remote_request_id": 5}, "remote_request_id = 5: expected str, got int"),
    ({"remote_engine_id": "\x1b[2J"}, r"remote_engine_id = '\x1b[2J': expected a text without"),
    ({"lynx": []}, "lynx = []: expected object, got array"),
    ({"lynx": {"version": 4}}, "lynx.num_tokens is missing"),
    ({"remote_host": 10**5000}, "remote_host = (a int too large to show): expected"),
]
OURS = [
    ({"ports": [1, 70000]}, "lynx.ports[1] = 70000: expected int <= 65535"),
    ({"ports": []}, "lynx.ports = []: expected array of length >= 1"),
    ({"final_tier": "best"}, "lynx.final_tier = 'best': expected one of residual, exact"),
    ({"num_tokens": "5"}, "lynx.num_tokens = '5': expected int, got str"),
    ({"tables": ["x"]}, "lynx.tables[0] = 'x': expected 32 hexadecimal digits"),
    ({"codec": "klt"}, "codec klt on 1 ranks needs 1 tables, the handoff names 0"),
]


@pytest.mark.parametrize(
    ("params", "says"),
    [(handoff() | change, says) for change, says in CASES]
    + [(handoff(**lynx), says) for lynx, says in OURS],
    ids=range(len(CASES) + len(OURS)),
)
def test_field_value_and_what_is_accepted(params, says):
    with pytest.raises(MalformedError) as caught:
        parse_handoff(params)
    assert str(caught.value).startswith(f"malformed kv_transfer_params: {says}")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 250


@pytest.mark.parametrize("value", ["x" * (1 << 20), NESTED], ids=["long", "deep"])
def test_any_value_makes_a_short_text(value):
    with pytest.raises(MalformedError) as caught:
        parse_handoff(handoff() | {"remote_host": value})
    assert len(str(caught.value)) < 250


def test_mooncakes_leg_and_its_name():
    leg = {"remote_bootstrap_addr": "ftp://h", "transfer_id": "t", "remote_engine_id": "e"}
    with pytest.raises(MalformedError, match="remote_bootstrap_addr = 'ftp://h': expected http://"):
        parse_mooncake_leg(leg)
    with pytest.raises(MalformedError, match=r"transfer_id \[1\] is not a string"):
        check_transfer_id([1])


def test_another_version_is_not_malformed():
    with pytest.raises(ProtocolError) as caught:
        parse_handoff(handoff(version=99))
    assert not isinstance(caught.value, MalformedError)


@pytest.mark.parametrize("lynx", [{"final_tier": "best"}, {"codec": "klt"}, {"num_tokens": None}])
def test_where_a_transfer_is_can_be_read_of_a_broken_handoff(lynx):
    where = whereabouts(handoff(**lynx))
    assert (where.remote_request_id, where.remote_host, where.lynx.ports) == (
        "t",
        "10.0.0.1",
        [7600],
    )


@pytest.mark.parametrize(
    "params", [{}, handoff() | {"lynx": None}, handoff(ports="x"), handoff() | {"remote_host": ""}]
)
def test_where_a_transfer_is_may_be_unknown(params):
    assert whereabouts(params) is None
