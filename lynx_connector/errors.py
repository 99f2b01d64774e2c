# SPDX-License-Identifier: Apache-2.0
"""Errors that name their cause.

`TransferError` carries the one line that a log, an HTTP client or a peer gets to see.
`shown` is for every text in it that a peer, a router or a client has chosen.
"""

MAX_SHOWN = 128


def shown(text: object, limit: int = MAX_SHOWN) -> str:
    """A foreign text fit for a log line: printable, on one line, at most `limit` characters.

    Control characters, line breaks, lone surrogates and marks that turn the writing direction are
    escaped; the middle of a longer text is left out, and its length said.
    """
    text = text if isinstance(text, str) else repr(text)
    if len(text) > limit:  # first of all: it may be megabytes
        dropped = f"...({len(text)} characters)..."
        keep = max(limit - len(dropped), 8)
        text = text[: keep - keep // 4] + dropped + text[len(text) - keep // 4 :]
    if text.isprintable():
        return text
    escaped = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return escaped if len(escaped) <= limit else escaped[: limit - 3] + "..."


class LynxError(Exception):
    """Base of every error that Lynx raises on purpose."""


class ConfigError(LynxError, ValueError):
    """Refused at start-up: names the key, the value and the remedy."""


class ProtocolError(LynxError):
    """A peer sent something that this protocol version does not allow."""


class MalformedError(ProtocolError):
    """A client or router sent no handoff: names the field, its value and what is accepted."""


class AuthenticationError(ProtocolError):
    """The peer does not hold the shared secret, or one side has none."""


class NotAllowedError(ProtocolError):
    """A request names a prefill that this instance may not connect to."""


class TransferError(LynxError):
    """One request's transfer ended early; the request falls back per policy."""
