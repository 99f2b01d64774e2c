# SPDX-License-Identifier: Apache-2.0
"""Every cause that Lynx writes has its code; any text has one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lynx_connector.telemetry.failures import CAUSES, failure_code


@pytest.mark.parametrize(
    ("cause", "code"),
    [
        ("no consumer within lease_seconds=120", "lease_expired"),
        ("transfer was released: no consumer within lease_seconds=120", "lease_expired"),
        ("prefill's staging is full: 5 bytes needed, 1 of 2 in use", "staging_full"),
        ("staging is full: 5 bytes needed", "staging_full"),
        ("transfer of 9 bytes exceeds this instance's staging_bytes=3", "staging_full"),
        ("consumer's staging is too small", "staging_full"),
        ("request ended before its prefill did", "prefill_failed"),
        ("h:1: transfer was released: request ended before its prefill did", "prefill_failed"),
        ("prefill could not encode its KV", "encode_failed"),
        ("h:1: peer holds another shared secret", "authentication"),
        ("prefill speaks Lynx protocol 1, this instance 2: run the same", "incompatible"),
        ("h:1: peer has another model, cache dtype or tensor parallel size", "incompatible"),
        ("h:1: peer has another model (its weights: serve the same files)", "incompatible"),
        ("h:1: peer refused: peer has another model configuration (--dtype)", "incompatible"),
        ("h:1: peer has another cache dtype, shape or --tensor-parallel-size", "incompatible"),
        ("h:1: corrupt anchor frame at token 3 (checksum differs)", "checksum"),
        ("exact tier: checksum of token 3 differs", "checksum"),
        (
            "h:1: corrupt anchor frame at token 3 (a frame was changed, cut or replayed on its "
            "way, or is not the peer's)",
            "checksum",
        ),
        ("h:1: a control message was changed on its way, or is not the peer's", "checksum"),
        ("h:1: all was sent, but frames are missing", "checksum"),
        ("remote_host evil is not among allowed_prefills of this instance", "not_allowed"),
        ("bootstrap http://h:1: its answer is not proved with the shared secret", "authentication"),
        (
            "h:1: met, but UCX did not get through within 10 s: open the prefill's",
            "connection_lost",
        ),
        ("cannot resolve host 'x': Name or service not known", "connection_lost"),
        ("h:1: handshake timed out: no answer within 2 s", "timeout"),
        ("h:1: silent for 20 s", "timeout"),
        ("h:1: handshake timed out", "timeout"),
        ("h:1: tables 0a not sent within 5 s", "timeout"),
        ("cannot connect to h:1: refused", "connection_lost"),
        ("connection to h:1 lost: reset", "connection_lost"),
        ("h:1: tables 0a: prefill does not have these tables (any more)", "tables"),
        ("malformed kv_transfer_params: x", "malformed"),
        ("h:1: unexpected residual frame", "malformed"),
        ("h:1: unknown transfer", "unknown_transfer"),
        ("transfer is already used by request r", "refused"),
        ("h:1: transfer was released: done", "refused"),
        ("failed: h:1: silent for 20 s", "timeout"),
        ("bootstrap http://h:1: no prefill leg with transfer_id 't' within 10 s", "bootstrap"),
        ("bootstrap http://h:1: All connection attempts failed", "bootstrap"),
        ("bootstrap http://h:1: prefill ended early (FINISHED_ABORTED)", "prefill_failed"),
        ("prefill's bootstrap server: x", "bootstrap"),
        ("h:1: expected Welcome, got Failure", "malformed"),
        ("not a Lynx message (starts with b'GET ')", "malformed"),
        ("malformed kv_transfer_params: transfer_id 5 is not a string of", "malformed"),
        ("transfer_id 't' was used before", "refused"),
        ("unknown codec 'zip'", "incompatible"),
        ("the sky fell", "other"),
        ("done", None),
        ("request ended", None),
        ("request ended before its load", None),
        ("cancelled by the decode instance", None),
        ("nothing to load", None),
    ],
)
def test_causes_become_few_codes(cause, code):
    assert failure_code(cause) == code


@given(st.text())
def test_any_cause_has_a_documented_code(cause):
    assert failure_code(cause) in (*CAUSES, None)
