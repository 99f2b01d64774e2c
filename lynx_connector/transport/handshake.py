# SPDX-License-Identifier: Apache-2.0
"""What two workers say first: version, compatibility, and mutual proof of a shared secret.

Proofs are HMAC-SHA256 over all that both sides said before, one direction each, so that neither
side can replay the other's, or change what it said. Without a secret the proofs are empty, and
nothing is sealed afterwards.
"""

import hashlib
import hmac
import secrets
from dataclasses import dataclass

from lynx_connector import __version__
from lynx_connector.errors import AuthenticationError, ProtocolError
from lynx_connector.transport.seal import EphemeralKey, Seals
from lynx_connector.transport.stream import MessageStream, expect
from lynx_connector.wire import identity, messages
from lynx_connector.wire.secrets import NO_SECRETS, SharedSecrets

PROBE = "probe"
"""In place of a compatibility hash: who says so only wants to know whether it could connect."""


@dataclass(frozen=True)
class Identity:
    """What this worker says of itself."""

    compat: str
    peer: str
    """Shown in the other side's log, e.g. `engine-id/rank`."""
    secrets: SharedSecrets = NO_SECRETS
    encrypt: bool = False
    """Whether payloads must be sealed; needs secrets."""


async def greet(stream: MessageStream, own: Identity) -> messages.Welcome:
    """The consumer's half; the producer goes on with `Ready`.

    Raises:
        ProtocolError: version or model differ, or the peer refused.
        AuthenticationError: the secrets differ.
        ConnectionError: the peer is gone.
    """
    known = own.secrets.current()
    key = EphemeralKey() if known else None
    hello = messages.Hello(
        messages.PROTOCOL_VERSION,
        __version__,
        own.compat,
        own.peer,
        secrets.token_bytes(32),
        own.encrypt,
        key.public if key else b"",
    )
    stream.write(hello)
    welcome = await expect(stream, messages.Welcome)
    _check_version(welcome.version, welcome.release)
    _check_compat(welcome.compat, own.compat)
    said = _said(hello, welcome)
    # The producer's own choice, so that it accepts the answer whatever else is known here.
    secret = _proved(known, b"producer", said, welcome.proof)
    stream.write(messages.Proof(_proof(secret, b"consumer", said)))
    if key is not None:
        payloads = hello.encrypt or welcome.encrypt
        stream.seal(Seals.derive(key.shared_with(welcome.key), secret, said, False, payloads))
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
    known = own.secrets.current()
    key = EphemeralKey() if known else None
    answer = messages.Welcome(
        messages.PROTOCOL_VERSION,
        __version__,
        own.compat,
        own.peer,
        secrets.token_bytes(32),
        b"",
        own.encrypt,
        key.public if key else b"",
    )
    said = _said(hello, answer)
    answer.proof = _proof(known[0] if known else b"", b"producer", said)
    stream.write(answer)
    proof = await expect(stream, messages.Proof)
    secret = _proved(known, b"consumer", said, proof.proof)
    if key is not None:
        payloads = hello.encrypt or answer.encrypt
        stream.seal(Seals.derive(key.shared_with(hello.key), secret, said, True, payloads))
    stream.trust()
    return hello


def _said(hello: messages.Hello, welcome: messages.Welcome) -> bytes:
    """Digest of all that both sides have said before they prove anything."""
    said = hashlib.sha256(b"lynx-4")
    for message in (hello, welcome):
        for part in (
            str(message.version).encode(),
            message.release.encode(),
            message.compat.encode(),
            message.peer.encode(),
            message.nonce,
            message.key,
            b"encrypt" if message.encrypt else b"",
        ):
            said.update(len(part).to_bytes(4, "little") + part)
    return said.digest()


def _proof(secret: bytes, direction: bytes, said: bytes) -> bytes:
    return hmac.digest(secret, direction + said, "sha256") if secret else b""


def _proved(known: tuple[bytes, ...], direction: bytes, said: bytes, proof: bytes) -> bytes:
    """The secret that the peer has proved; empty where neither side has one."""
    if not known:
        if proof:
            raise AuthenticationError("peer has a shared secret, this side none: set secret_file")
        return b""
    if not proof:
        raise AuthenticationError("peer has no shared secret: set secret_file there")
    for secret in known:
        if hmac.compare_digest(proof, _proof(secret, direction, said)):
            return secret
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
