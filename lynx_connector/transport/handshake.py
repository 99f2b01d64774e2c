# SPDX-License-Identifier: Apache-2.0
"""How two workers meet: version, compatibility, and mutual proof of a shared secret.

Proofs are HMAC-SHA256 over both nonces and the compatibility hash, one direction each, so that
neither side can replay the other's. Without a secret the proofs are empty.
"""

import asyncio
import hashlib
import hmac
import secrets
from dataclasses import dataclass
from typing import TypeVar

from lynx_connector import __version__
from lynx_connector.errors import AuthenticationError, ProtocolError
from lynx_connector.transport.connection import Connection
from lynx_connector.wire import identity, messages

HANDSHAKE_SECONDS = 10.0

M = TypeVar("M", bound=messages.Message)


@dataclass(frozen=True)
class Identity:
    """What this worker says of itself."""

    compat: str
    peer: str
    """Shown in the other side's log, e.g. `engine-id/rank`."""
    secret: bytes | None = None


def _proof(secret: bytes | None, direction: bytes, *parts: bytes) -> bytes:
    if secret is None:
        return b""
    return hmac.new(
        secret, b"lynx-1|" + direction + b"|" + b"|".join(parts), hashlib.sha256
    ).digest()


def _check(secret: bytes | None, proof: bytes, expected: bytes) -> None:
    if secret is None and proof:
        raise AuthenticationError("peer has a shared secret, this side none: set secret_file")
    if secret is not None and not proof:
        raise AuthenticationError("peer has no shared secret: set secret_file there")
    if not hmac.compare_digest(proof, expected):
        raise AuthenticationError("peer holds another shared secret")


def _check_peer(version: int, release: str, compat: str, own: Identity) -> None:
    if version != messages.PROTOCOL_VERSION:
        raise ProtocolError(
            f"peer speaks protocol {version} (lynx-connector {release}), this side "
            f"{messages.PROTOCOL_VERSION} ({__version__}): install the same version"
        )
    if different := identity.difference(own.compat, compat):
        raise ProtocolError(f"peer has {different}")


async def greet(connection: Connection, own: Identity) -> messages.Welcome:
    """The consumer's half.

    Raises:
        ProtocolError: version or model differ, or the peer refused.
        AuthenticationError: the secrets differ.
        ConnectionError, TimeoutError: the peer is gone or silent.
    """
    async with asyncio.timeout(HANDSHAKE_SECONDS):
        nonce = secrets.token_bytes(32)
        await connection.send(
            messages.Hello(messages.PROTOCOL_VERSION, __version__, own.compat, own.peer, nonce)
        )
        welcome = _expect(await connection.receive(), messages.Welcome)
        _check_peer(welcome.version, welcome.release, welcome.compat, own)
        compat = own.compat.encode()
        expected = _proof(own.secret, b"producer", nonce, welcome.nonce, compat)
        _check(own.secret, welcome.proof, expected)
        proof = _proof(own.secret, b"consumer", welcome.nonce, nonce, compat)
        await connection.send(messages.Proof(proof))
        _expect(await connection.receive(), messages.Ready)
        return welcome


async def welcome(connection: Connection, own: Identity, tables: str = "") -> messages.Hello:
    """The producer's half; a peer that fails it is told why. `tables` is announced.

    Raises:
        ProtocolError, AuthenticationError, ConnectionError, TimeoutError: as for `greet`.
    """
    async with asyncio.timeout(HANDSHAKE_SECONDS):
        try:
            hello = _expect(await connection.receive(), messages.Hello)
            _check_peer(hello.version, hello.release, hello.compat, own)
            nonce = secrets.token_bytes(32)
            compat = own.compat.encode()
            proof = _proof(own.secret, b"producer", hello.nonce, nonce, compat)
            await connection.send(
                messages.Welcome(
                    messages.PROTOCOL_VERSION,
                    __version__,
                    own.compat,
                    own.peer,
                    nonce,
                    proof,
                    tables,
                )
            )
            answer = _expect(await connection.receive(), messages.Proof)
            expected = _proof(own.secret, b"consumer", nonce, hello.nonce, compat)
            _check(own.secret, answer.proof, expected)
            await connection.send(messages.Ready())
            return hello
        except ProtocolError as error:
            await connection.send(messages.Refused(str(error)[: messages.MAX_CAUSE]))
            raise


def _expect(message: messages.AnyMessage, kind: type[M]) -> M:
    if isinstance(message, messages.Refused):
        raise ProtocolError(f"peer refused: {message.cause}")
    if not isinstance(message, kind):
        raise ProtocolError(f"expected {kind.__name__}, got {type(message).__name__}")
    return message
