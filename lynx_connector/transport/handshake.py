# SPDX-License-Identifier: Apache-2.0
"""What two workers say first: version, compatibility, and mutual proof of a shared secret.

Proofs are HMAC-SHA256 over all that both sides said before, one direction each, so that neither
side can replay the other's, or change what it said. Without a secret the proofs are empty.
"""

import hashlib
import hmac
import secrets
from dataclasses import dataclass

from lynx_connector import __version__
from lynx_connector.errors import AuthenticationError, ProtocolError
from lynx_connector.transport.stream import MessageStream, expect
from lynx_connector.wire import identity, messages

PROBE = "probe"
"""In place of a compatibility hash: who says so only wants to know whether it could connect."""


@dataclass(frozen=True)
class Identity:
    """What this worker says of itself."""

    compat: str
    peer: str
    """Shown in the other side's log, e.g. `engine-id/rank`."""
    secret: bytes | None = None


def _proof(
    secret: bytes | None, direction: bytes, hello: messages.Hello, welcome: messages.Welcome
) -> bytes:
    if secret is None:
        return b""
    said = hmac.new(secret, b"lynx-4|" + direction, hashlib.sha256)
    for message in (hello, welcome):
        for part in (
            str(message.version).encode(),
            message.compat.encode(),
            message.peer.encode(),
            message.nonce,
            message.key,
            b"encrypt" if message.encrypt else b"",
        ):
            said.update(len(part).to_bytes(4, "little") + part)
    return said.digest()


def _check(secret: bytes | None, proof: bytes, expected: bytes) -> None:
    if secret is None and proof:
        raise AuthenticationError("peer has a shared secret, this side none: set secret_file")
    if secret is not None and not proof:
        raise AuthenticationError("peer has no shared secret: set secret_file there")
    if not hmac.compare_digest(proof, expected):
        raise AuthenticationError("peer holds another shared secret")


def _check_version(version: int, release: str) -> None:
    if version != messages.PROTOCOL_VERSION:
        raise ProtocolError(
            f"peer speaks protocol {version} (lynx-connector {release}), this side "
            f"{messages.PROTOCOL_VERSION} ({__version__}): install the same version"
        )


def _check_compat(compat: str, own: str) -> None:
    if PROBE in (compat, own):
        return
    if different := identity.difference(own, compat):
        raise ProtocolError(f"peer has {different}")


async def greet(stream: MessageStream, own: Identity) -> messages.Welcome:
    """The consumer's half; the producer goes on with `Ready`.

    Raises:
        ProtocolError: version or model differ, or the peer refused.
        AuthenticationError: the secrets differ.
        ConnectionError: the peer is gone.
    """
    hello = messages.Hello(
        messages.PROTOCOL_VERSION, __version__, own.compat, own.peer, secrets.token_bytes(32)
    )
    stream.write(hello)
    welcome = await expect(stream, messages.Welcome)
    _check_version(welcome.version, welcome.release)
    _check_compat(welcome.compat, own.compat)
    _check(own.secret, welcome.proof, _proof(own.secret, b"producer", hello, welcome))
    stream.write(messages.Proof(_proof(own.secret, b"consumer", hello, welcome)))
    stream.trust()
    return welcome


async def welcome(stream: MessageStream, own: Identity) -> messages.Hello:
    """The producer's half.

    Raises:
        ProtocolError, AuthenticationError, ConnectionError: as for `greet`.
    """
    hello = await expect(stream, messages.Hello)
    _check_version(hello.version, hello.release)
    _check_compat(hello.compat, own.compat)
    answer = messages.Welcome(
        messages.PROTOCOL_VERSION,
        __version__,
        own.compat,
        own.peer,
        secrets.token_bytes(32),
        b"",
    )
    answer.proof = _proof(own.secret, b"producer", hello, answer)
    stream.write(answer)
    proof = await expect(stream, messages.Proof)
    _check(own.secret, proof.proof, _proof(own.secret, b"consumer", hello, answer))
    stream.trust()
    return hello
