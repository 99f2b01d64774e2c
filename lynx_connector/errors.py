# SPDX-License-Identifier: Apache-2.0
"""Errors that name their cause.

`TransferError` carries the one line that a log, an HTTP client or a peer gets to see.
"""


class LynxError(Exception):
    """Base of every error that Lynx raises on purpose."""


class ConfigError(LynxError, ValueError):
    """Refused at start-up: names the key, the value and the remedy."""


class ProtocolError(LynxError):
    """A peer sent something that this protocol version does not allow."""


class AuthenticationError(ProtocolError):
    """The peer does not hold the shared secret, or one side has none."""


class TransferError(LynxError):
    """One request's transfer ended early; the request falls back per policy."""
