# SPDX-License-Identifier: Apache-2.0
"""What clients, routers and peers name things reaches no log raw, and no log whole."""

import ast
import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lynx_connector.errors import MAX_SHOWN, LynxError, TransferError, shown
from lynx_connector.telemetry import logs
from lynx_connector.wire.handoff import check_transfer_id, parse_handoff, parse_mooncake_leg
from tests.unit import objects

ROOT = Path(__file__).parents[3]

HOSTILE = [
    "x" * (1 << 20),
    "a\x00b",
    "line\nINFO: forged",
    "line\r\nforged",
    "\x1b[2J\x1b]0;title\x07",
    "\u202egnp.exe",
    "\u2028forged",
    "\ud800",
    "\x9b31m",
]


@given(st.text(alphabet=st.characters(exclude_categories=()), max_size=1000), st.integers(32, 300))
def test_what_is_shown_is_short_and_printable(text, limit):
    out = shown(text, limit)
    assert out.isprintable() and len(out) <= limit
    out.encode()


@given(st.text(alphabet=st.characters(categories=["L", "N", "P"]), max_size=MAX_SHOWN))
def test_ordinary_text_is_shown_as_it_is(text):
    assert shown(text) == text


def test_a_long_text_says_how_long_it_is():
    assert "(1048576 characters)" in shown("x" * (1 << 20))


def loggers():
    """Names of all loggers in the source."""
    for path in (ROOT / "lynx_connector").rglob("*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("getLogger", "init_logger") and path.name != "logs.py":
                first = node.args[0]
                yield first.value if isinstance(first, ast.Constant) else f"vllm.{module}"


def test_every_logger_is_guarded():
    found = set(loggers())
    assert found and found <= set(logs.LOGGERS)
    for name in found:
        assert logs._show_texts in logging.getLogger(name).filters


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text[:8]))
@pytest.mark.parametrize("name", logs.LOGGERS)
def test_no_log_line_takes_it_raw(name, text, caplog):
    caplog.set_level(logging.INFO)
    logger = logging.getLogger(name)
    was, logger.propagate = logger.propagate, True
    logger.addHandler(caplog.handler)
    try:
        logger.warning("request %s: %s (%d)", text, TransferError(text), 3)
    finally:
        logger.removeHandler(caplog.handler)
        logger.propagate = was
    line = caplog.records[0].getMessage()
    assert line.isprintable() and len(line) < 1200
    assert line.endswith("(3)")


REFUSED = [text for text in HOSTILE if "\u202e" not in text]  # that one can be encoded and named


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: repr(text[:8]))
@pytest.mark.parametrize("field", ["remote_host", "remote_engine_id", "remote_request_id"])
def test_a_handoff_with_it_is_refused(field, text):
    with pytest.raises(LynxError) as caught:
        parse_handoff(objects.handoff() | {field: text})
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text[:8]))
def test_a_bootstrap_address_with_it_is_refused(text):
    leg = {"transfer_id": "t", "remote_engine_id": "e", "remote_bootstrap_addr": "http://" + text}
    with pytest.raises(LynxError) as caught:
        parse_mooncake_leg(leg)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600


@pytest.mark.parametrize("text", [*REFUSED, "", 5, None, ["x"]], ids=lambda text: repr(text)[:8])
def test_a_transfer_id_with_it_is_refused(text):
    with pytest.raises(LynxError, match="transfer_id") as caught:
        check_transfer_id(text)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 200
    assert check_transfer_id("cmpl-1_a/b ü") == "cmpl-1_a/b ü"


VERSIONS = [10**5000, -(10**5000), 10**19, True, 2.5, "3"]


@pytest.mark.parametrize("version", VERSIONS, ids=range(len(VERSIONS)))
def test_a_version_of_thousands_of_digits(version):
    with pytest.raises(LynxError) as caught:
        parse_handoff(objects.handoff(version=version))
    assert len(str(caught.value)) < 300


def test_a_codec_that_is_none_is_shown_escaped():
    with pytest.raises(LynxError) as caught:
        parse_handoff(objects.handoff(codec="\u202ex\u0bdb", tables=["0" * 32]))
    assert str(caught.value).isprintable()
