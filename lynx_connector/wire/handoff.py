# SPDX-License-Identifier: Apache-2.0
"""What a router carries from a prefill to its decode leg, in the NIXL connector's or Mooncake's
shape, and what a prefill's bootstrap server says of it."""

import hmac
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import xxhash
from msgspec import Meta

from lynx_connector.config import FinalTier
from lynx_connector.errors import MalformedError, ProtocolError, shown
from lynx_connector.wire.fields import malformed
from lynx_connector.wire.messages import (
    DECODE_ERRORS,
    PROTOCOL_VERSION,
    Digest,
    Id,
    MaybeDigest,
    Text,
    TokenId,
)

_CONVERT_ERRORS = (msgspec.ValidationError, UnicodeError, RecursionError)

TABLE_CODECS = ("klt",)
"""Codecs that need learned tables."""

Host = Annotated[
    str, Meta(min_length=1, max_length=253, pattern=r"^[^\s\x00-\x20\x7f-\x9f\ud800-\udfff]+\Z")
]
Ports = Annotated[list[Annotated[int, Meta(ge=1, le=65535)]], Meta(min_length=1, max_length=512)]
AnchorBits = Annotated[int, Meta(ge=3, le=5)]


class LynxParams(msgspec.Struct, forbid_unknown_fields=False):
    """What travels under the key `lynx` of `kv_transfer_params`.

    Unknown fields are ignored, so that a newer producer can add some without a new version.
    `tables` holds a digest per rank for a codec with learned tables, and is empty for the others.
    `final_tier` is the tier that verification waits for. `draft_limit` is how many drafts are worth
    their verification, by the producer's plan; 0: it does not say. `first_token` is what the
    prefill sampled, None where it is not handed over or not known yet; `sampling` says under which
    parameters (`first_token.sampling_digest`), so that a consumer can tell whether they are its
    own.
    """

    version: int
    num_tokens: Annotated[int, Meta(ge=1, le=1 << 32)]
    codec: Id
    exact_first: Annotated[int, Meta(ge=0, le=1024)]
    exact_last: Annotated[int, Meta(ge=0, le=1024)]
    ports: Ports
    anchor_bits: AnchorBits
    final_tier: FinalTier
    tables: Annotated[list[Digest], Meta(max_length=512)]
    draft_limit: Annotated[int, Meta(ge=0, le=1024)] = 0
    early: bool = False
    """The prefill still ran when this was said; how it ends comes over the transport."""
    prompt: Annotated[str, Meta(max_length=16)] = ""
    """`prompt_digest` of the prompt; empty where it has no token ids."""
    first_token: TokenId | None = None
    sampling: MaybeDigest = ""
    adapter: Text = ""
    """Name of the LoRA adapter that the prompt was computed with; empty: none."""
    cached_tokens: Annotated[int, Meta(ge=0, le=1 << 32)] = 0
    """Of the prompt's tokens those that the prefill found in its prefix cache."""


class Handoff(msgspec.Struct, forbid_unknown_fields=False):
    """The prefill's reply in the NIXL shape, as a decode instance reads it.

    Source of the shape: vllm/distributed/kv_transfer/kv_connector/v1/nixl/pull_scheduler.py.
    """

    remote_engine_id: Id
    remote_request_id: Id
    remote_host: Host
    lynx: LynxParams

    @property
    def transfer_id(self) -> str:
        """The producer's name of this transfer."""
        return self.remote_request_id

    def params(self) -> dict[str, Any]:
        """`kv_transfer_params` of the prefill's reply, which routers pass on as they are."""
        ports = self.lynx.ports
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": [],
            "remote_port": ports[0],
            "tp_size": len(ports),
            "remote_num_tokens": self.lynx.num_tokens,
            **msgspec.to_builtins(self),
        }

    def address(self, rank: int) -> tuple[str, int]:
        """Where the producer's worker `rank` listens."""
        return self.remote_host, self.lynx.ports[rank]


class Whereabouts(msgspec.Struct, forbid_unknown_fields=False):
    """Where a transfer is staged: what giving it back takes of a handoff."""

    class Workers(msgspec.Struct, forbid_unknown_fields=False):
        """Of `LynxParams`."""

        ports: Ports

    remote_request_id: Id
    remote_host: Host
    lynx: Workers


class MooncakeLeg(msgspec.Struct, forbid_unknown_fields=False):
    """A decode leg of a router that speaks Mooncake's handoff.

    Source of the shape: mooncake/mooncake_connector.py beside the NIXL connector.
    """

    transfer_id: Id
    remote_engine_id: Id
    remote_bootstrap_addr: Annotated[
        str, Meta(max_length=256, pattern=r"^https?://[^/?#@\s\x00-\x20\x7f-\U0010ffff]+/?\Z")
    ]


class BootstrapAnswer(msgspec.Struct, omit_defaults=True):
    """What a prefill's bootstrap server says of a transfer.

    unknown: no prefill leg has come (or it was long ago). pending: it waits for its turn. ready:
    `handoff` is what a reply in the NIXL shape would carry. failed: `cause` says why.
    """

    state: Literal["unknown", "pending", "ready", "failed"]
    handoff: dict[str, Any] | None = None
    cause: Text = ""
    proof: Text = ""
    """`handoff_proof` where the prefill has a shared secret: the answer itself is plain HTTP."""


def handoff_proof(secret: bytes, transfer_id: str, handoff: dict[str, Any]) -> str:
    """HMAC-SHA256 as hex: that who knows the secret has said this of that transfer."""
    said = msgspec.json.encode([transfer_id, handoff], order="deterministic")
    return hmac.digest(secret, b"lynx-4 handoff" + said, "sha256").hex()


def check_transfer_id(value: object) -> str:
    """A router's own name of a transfer, as a prefill leg brings it.

    Raises:
        MalformedError: it cannot name one.
    """
    try:
        return msgspec.convert(value, Id)
    except _CONVERT_ERRORS:
        raise MalformedError(
            f"malformed kv_transfer_params: transfer_id {shown(repr(value), 64)} is not a string "
            "of 1 to 128 characters without control characters"
        ) from None


def parse_answer(body: bytes | bytearray) -> BootstrapAnswer:
    """What a bootstrap server has sent.

    Raises:
        ProtocolError: it is no answer.
    """
    try:
        return msgspec.json.decode(body, type=BootstrapAnswer)
    except DECODE_ERRORS as error:
        raise ProtocolError(f"malformed answer: {shown(str(error))}") from None


def prompt_digest(token_ids: list[int] | None, media: Iterable[str] = ()) -> str:
    """xxh3-64 of a prompt's token ids (int64, little-endian) as hex; empty for None.

    media: vLLM's hashes of the images and the like that stand behind placeholders.
    """
    if token_ids is None:
        return ""
    digest = xxhash.xxh3_64(np.asarray(token_ids, "<i8").tobytes())
    for one in media:
        digest.update(one.encode() + b"\0")
    return digest.hexdigest()


def parse_mooncake_leg(params: dict[str, Any]) -> MooncakeLeg | None:
    """A decode leg in Mooncake's shape; None if it has another one.

    Raises:
        MalformedError: naming what is missing or wrong.
    """
    if "lynx" in params or "remote_bootstrap_addr" not in params:
        return None
    try:
        leg = msgspec.convert(params, MooncakeLeg)
    except _CONVERT_ERRORS as error:
        raise malformed("kv_transfer_params", error, params) from None
    leg.remote_bootstrap_addr = leg.remote_bootstrap_addr.rstrip("/")
    return leg


def parse_handoff(params: dict[str, Any]) -> Handoff:
    """Validate a decode leg's `kv_transfer_params`.

    Raises:
        MalformedError: naming what is missing or wrong.
        ProtocolError: the prefill speaks another version.
    """
    if "lynx" not in params:
        raise MalformedError(
            "kv_transfer_params has no key 'lynx': the prefill instance does not run LynxConnector"
        )
    _check_version(params["lynx"])
    try:
        handoff = msgspec.convert(params, Handoff)
    except _CONVERT_ERRORS as error:
        raise malformed("kv_transfer_params", error, params) from None
    lynx = handoff.lynx
    needed = len(lynx.ports) if lynx.codec in TABLE_CODECS else 0
    if len(lynx.tables) != needed:
        raise MalformedError(
            f"malformed kv_transfer_params: codec {shown(lynx.codec)} on {len(lynx.ports)} ranks "
            f"needs {needed} tables, the handoff names {len(lynx.tables)}"
        )
    return handoff


def whereabouts(params: dict[str, Any]) -> Whereabouts | None:
    """Where the transfer of a malformed handoff is; None where that cannot be told, either."""
    try:
        return msgspec.convert(params, Whereabouts)
    except _CONVERT_ERRORS:
        return None


def _check_version(lynx: object) -> None:
    """First of all: another version may lack fields that this one needs."""
    version = lynx.get("version") if isinstance(lynx, dict) else None
    if isinstance(version, int) and version != PROTOCOL_VERSION:
        raise ProtocolError(
            f"prefill speaks Lynx protocol {_number(version)}, this instance "
            f"{PROTOCOL_VERSION}: run the same lynx-connector on both sides"
        )


def _number(value: int) -> str:
    """As decimal digits, which Python refuses to make of very large numbers."""
    return str(value) if abs(value) < 1 << 64 else "(a very large number)"
