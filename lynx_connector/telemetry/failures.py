# SPDX-License-Identifier: Apache-2.0
"""Why transfers fail: few codes for metrics, a remedy for each, and the one sentence that logs and
HTTP clients get. docs/metrics.md has the same table for people. Pure Python.
"""

from typing import NamedTuple

from lynx_connector.errors import shown

MAX_TEXT = 512
"""Characters of a sentence."""


class Failure(NamedTuple):
    """One code's causes: what their texts contain, and what to do about them."""

    parts: tuple[str, ...]
    remedy: str


FAILURES: dict[str, Failure] = {
    "lease_expired": Failure(
        ("no consumer within lease_seconds",),
        "see why the router sent the decode leg so late, or raise the prefill's lease_seconds",
    ),
    "staging_full": Failure(
        ("staging is full", "exceeds this instance's staging_bytes", "is too small"),
        "raise staging_bytes, or send fewer prompts at once",
    ),
    "prefill_failed": Failure(
        ("before its prefill did", "prefill failed", "prefill ended"),
        "the prefill's log has the reason",
    ),
    "encode_failed": Failure(
        ("prefill cannot encode", "prefill could not encode"), "the prefill's log has the reason"
    ),
    "other_prompt": Failure(
        ("prefill computed",),
        "serve one tokenizer, chat template and set of adapters on both sides",
    ),
    "not_allowed": Failure(
        ("allowed_prefills",),
        "add the prefill to this instance's allowed_prefills, or see who named that host",
    ),
    "authentication": Failure(
        ("shared secret", "no usable key"), "give both sides the same secret_file"
    ),
    "incompatible": Failure(
        (
            "speaks protocol",
            "speaks Lynx protocol",
            "another model",
            "another cache dtype",
            "they must be equal",
            "the same tokenizer",
            "unknown codec",
        ),
        "run one lynx-connector, model and configuration on both sides",
    ),
    "checksum": Failure(
        ("checksum", "on its way", "frames are missing"), "check memory and network of both hosts"
    ),
    "timeout": Failure(
        ("silent for", "timed out", "not sent within"),
        "see whether the prefill still runs and has CPU to spare",
    ),
    "bootstrap": Failure(
        ("no prefill leg", "bootstrap server", "the decode leg wants", "bootstrap http"),
        "see whether the router names the prefill's bootstrap_port and sends it the prefill leg",
    ),
    "connection_lost": Failure(
        (
            "cannot connect",
            "cannot resolve",
            "lost",
            "closed",
            "did not get through",
            "no transport in common",
        ),
        "see whether the prefill still runs and can be reached: lynx doctor --peer HOST:PORT",
    ),
    "tables": Failure(("tables",), "the prefill's log, and tables_dir of both sides"),
    "malformed": Failure(
        (
            "malformed",
            "expected ",
            "announces",
            "not a Lynx message",
            "control message",
            "that was not sent",
            "is not a string",
            "came before",
            "no key 'lynx'",
            "asked for tokens",
            "exact tier:",
        ),
        "see whether the router passes on kv_transfer_params as the prefill's reply had them",
    ),
    "unknown_transfer": Failure(
        ("unknown transfer",), "the prefill has restarted, or its lease_seconds are over"
    ),
    "refused": Failure(
        ("already used", "used before", "refused", "was released"),
        "a router may send each prefill's reply to one decode request only",
    ),
}
"""By code; the first whose parts fit a cause is taken."""

CAUSES = (*FAILURES, "other")

_ORDINARY_ENDS = ("done", "request ended", "cancelled", "nothing to load")
_NOT_ORDINARY = "request ended before its prefill"


def failure_code(cause: str) -> str | None:
    """The label of a free-text cause, one of `CAUSES`; None for an end that is no failure."""
    if cause.startswith(_ORDINARY_ENDS) and not cause.startswith(_NOT_ORDINARY):
        return None
    for code, failure in FAILURES.items():
        if any(part in cause for part in failure.parts):
            return code
    return "other"


def explain(cause: str, peer: str = "") -> str:
    """What happened with whom and what to do about it, on one printable line."""
    failure = FAILURES.get(failure_code(cause) or "")
    text = f"KV transfer from {peer} failed: {cause}" if peer else f"KV transfer failed: {cause}"
    return shown(f"{text} ({failure.remedy})" if failure else text, MAX_TEXT)
