# SPDX-License-Identifier: Apache-2.0
"""Authenticated encryption between two workers that have proved a shared secret to each other.

AES-256-GCM with a key for each direction of each connection, derived (HKDF-SHA256) from an
ephemeral X25519 exchange, the secret that was proved, and all that was said before. Nonces are
counters, one for messages and one for payloads: what is forged, replayed, left out, cut or out of
order does not open.
"""

from dataclasses import dataclass

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from lynx_connector.errors import AuthenticationError

OVERHEAD_BYTES = 16
"""By which sealed bytes are longer."""

_MESSAGE, _PAYLOAD = b"msg.", b"data"


class BrokenSealError(AuthenticationError):
    """What arrived is not what the peer sent next."""


class EphemeralKey:
    """One side's half of the exchange, for one connection."""

    def __init__(self) -> None:
        self._private = X25519PrivateKey.generate()
        self.public: bytes = self._private.public_key().public_bytes_raw()

    def shared_with(self, public: bytes) -> bytes:
        """The exchange's result.

        Raises:
            AuthenticationError: the peer's half is none.
        """
        try:
            return self._private.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError as error:
            raise AuthenticationError(f"peer sent no usable key: {error}") from None


class Seal:
    """One direction of one connection: `seal_*` at its one end, `open_*` at the other."""

    def __init__(self, key: bytes):
        self._cipher = AESGCM(key)
        self._messages = 0
        self._payloads = 0

    def seal_message(self, body: bytes) -> bytes:
        """The next control message, sealed."""
        return self._cipher.encrypt(self._message_nonce(), body, None)

    def open_message(self, sealed: bytes) -> bytes:
        """What `seal_message` was given.

        Raises:
            BrokenSealError: no further message of this connection can be read.
        """
        try:
            return self._cipher.decrypt(self._message_nonce(), sealed, None)
        except InvalidTag:
            raise BrokenSealError(
                "a control message was changed on its way, or is not the peer's"
            ) from None

    def seal_payload(self, header: bytes, payload: np.ndarray) -> np.ndarray:
        """The next payload (uint8), sealed, bound to its encoded header."""
        sealed = np.empty(payload.nbytes + OVERHEAD_BYTES, np.uint8)
        self._cipher.encrypt_into(self._payload_nonce(), payload.data, header, sealed.data)
        return sealed

    def open_payload(self, header: bytes, sealed: np.ndarray, payload: np.ndarray) -> None:
        """Write what `seal_payload` was given into `payload` (uint8, exact size).

        Raises:
            BrokenSealError: `payload` is all zeros then; later ones can still be opened.
        """
        try:
            self._cipher.decrypt_into(self._payload_nonce(), sealed.data, header, payload.data)
        except InvalidTag:
            payload[:] = 0
            raise BrokenSealError(
                "a frame was changed, cut or replayed on its way, or is not the peer's"
            ) from None

    def _message_nonce(self) -> bytes:
        self._messages += 1
        return _MESSAGE + self._messages.to_bytes(8, "little")

    def _payload_nonce(self) -> bytes:
        self._payloads += 1
        return _PAYLOAD + self._payloads.to_bytes(8, "little")


@dataclass(frozen=True)
class Seals:
    """Both directions of one connection, as one side has them."""

    out: Seal
    into: Seal
    payloads: bool
    """Whether payloads are sealed as well as messages."""

    @classmethod
    def derive(
        cls, exchanged: bytes, secret: bytes, said: bytes, producer: bool, payloads: bool
    ) -> "Seals":
        """Seals of one side.

        exchanged: the X25519 result. secret: the one that was proved. said: digest of the
        greeting. producer: whether this side is the producer.
        """
        keys = [
            HKDF(SHA256(), 32, salt=said, info=b"lynx-4 " + side).derive(exchanged + secret)
            for side in (b"producer", b"consumer")
        ]
        out, into = keys if producer else reversed(keys)
        return cls(Seal(out), Seal(into), payloads)
