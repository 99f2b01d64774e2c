# SPDX-License-Identifier: Apache-2.0
"""What routers carry: read back as it was written, and refused where it is malformed."""

import json

import pytest

from lynx_connector.config import FinalTier
from lynx_connector.errors import ProtocolError
from lynx_connector.wire.handoff import Handoff, LynxParams, parse_handoff
from tests.unit import objects


def handoff(**changes):
    lynx = changes.pop("lynx", {})
    return objects.handoff(**lynx) | changes


def test_handoff_survives_a_router_that_overwrites_the_host():
    parsed = parse_handoff(handoff(remote_host="prefill.example", added_by_router=1))
    assert parsed.address(0) == ("prefill.example", 7600)
    assert parsed.transfer_id == "t"


@pytest.mark.parametrize(
    ("params", "cause"),
    [
        ({"do_remote_prefill": True}, "no key 'lynx'"),
        (handoff(remote_host=None), "remote_host"),
        (handoff(remote_request_id=5), "remote_request_id"),
        (handoff(lynx={"ports": []}), "ports"),
        (handoff(lynx={"num_tokens": "ten"}), "num_tokens"),
        (handoff(lynx={"version": 99}), "protocol 99"),
        (handoff(lynx={"anchor_bits": 2}), "anchor_bits"),
        (handoff(lynx={"anchor_bits": "4"}), "anchor_bits"),
        (handoff(lynx={"final_tier": "anchor"}), "final_tier"),
        (handoff(lynx={"tables": ["../../etc/passwd"]}), "tables"),
        (handoff(lynx={"tables": "0" * 32}), "tables"),
        (handoff(lynx={"codec": "klt"}), "needs 1 tables, the handoff names 0"),
        (handoff(lynx={"codec": "klt", "tables": ["0" * 32] * 2}), "names 2"),
        (handoff(lynx={"tables": ["0" * 32]}), "needs 0 tables, the handoff names 1"),
        ({"do_remote_prefill": True, "lynx": {"version": 1, "ports": [1]}}, "protocol 1,"),
        (handoff() | {"lynx": "yes"}, "lynx"),
    ],
)
def test_malformed_handoffs_name_the_field(params, cause):
    with pytest.raises(ProtocolError, match=cause):
        parse_handoff(params)


def test_handoff_names_tables_per_rank():
    tables = ["0" * 32, "1" * 32]
    lynx = {"codec": "klt", "tables": tables, "ports": [1, 2], "anchor_bits": 3}
    parsed = parse_handoff(handoff(lynx=lynx | {"final_tier": "exact"}))
    assert parsed.lynx.tables == tables
    assert (parsed.lynx.anchor_bits, parsed.lynx.final_tier) == (3, "exact")


def test_a_reply_is_read_as_it_was_written():
    lynx = LynxParams(
        version=5,
        num_tokens=10,
        codec="klt",
        exact_first=1,
        exact_last=16,
        ports=[1234, 1235],
        anchor_bits=5,
        final_tier=FinalTier.EXACT,
        tables=["0" * 32, "1" * 32],
        draft_limit=7,
        early=True,
        prompt="a" * 16,
        first_token=3,
        sampling="2" * 32,
    )
    written = Handoff("engine", "transfer", "10.0.0.1", lynx)
    params = json.loads(json.dumps(written.params()))
    assert parse_handoff(params) == written
    assert (params["remote_port"], params["tp_size"], params["remote_num_tokens"]) == (1234, 2, 10)
