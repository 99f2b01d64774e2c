# SPDX-License-Identifier: Apache-2.0
"""Every message between two Lynx workers, and the handoff that a router carries.

Control messages are MessagePack by msgspec: typed, of bounded size, never pickle. On the wire each
is one fixed slot of `SLOT_BYTES` (length, then the message, then zeros); `Frame` and `Tables` are
followed by their payload.

Version history:
    1  first version: hello/challenge, fetch by tier order, frames of token-major rows.
    2  learned tables (announced in Welcome, TablesRequest, Tables, NoTables); anchor frames carry
       vectors that travel raw; a third, variable-length tier; the handoff names anchor_bits,
       final_tier and tables.
    3  the first token: in the handoff, or in Prefilled after an early reply; Prefilling; the
       handoff says whether its reply was early, and names the prompt. Fetch names the
       consumer's step time, the handoff how many drafts are worth it.
"""

import struct
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import xxhash
from msgspec import Meta

from lynx_connector.errors import ProtocolError

PROTOCOL_VERSION = 3

SLOT_BYTES = 1024
_LENGTH = struct.Struct("<4sI")
_MAGIC = b"LYNX"
MAX_CAUSE = 240

TABLE_CODECS = ("klt",)
"""Codecs that need learned tables."""

Text = Annotated[str, Meta(max_length=256)]
Id = Annotated[str, Meta(min_length=1, max_length=128)]
Count = Annotated[int, Meta(ge=0, le=1 << 40)]
Nonce = Annotated[bytes, Meta(max_length=64)]
PayloadBytes = Annotated[int, Meta(ge=1, le=1 << 30)]
Checksum = Annotated[int, Meta(ge=0)]
TokenId = Annotated[int, Meta(ge=0, lt=1 << 31)]
# Digests become file names: nothing but hex digits may pass. \Z, since $ allows a final newline.
Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]
MaybeDigest = Annotated[str, Meta(pattern=r"^(?:[0-9a-f]{32})?\Z")]
AnchorBits = Annotated[int, Meta(ge=3, le=5)]
FinalTier = Literal["residual", "exact"]


class Message(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Base of all control messages; the struct's name is the tag."""


class Hello(Message):
    """Consumer to producer, first message of a connection. These fields never change."""

    version: int
    release: Text
    compat: Text
    peer: Text
    nonce: Nonce


class Welcome(Message):
    """Producer's answer: its own identity, and its proof where a secret is configured.

    `tables` names the tables that its next requests will be encoded with, so that a consumer can
    ask for them before it needs them; empty where there are none.
    """

    version: int
    release: Text
    compat: Text
    peer: Text
    nonce: Nonce
    proof: Nonce
    tables: MaybeDigest = ""


class Proof(Message):
    """Consumer's proof, closing the handshake."""

    proof: Nonce


class Ready(Message):
    """Producer: the handshake holds."""


class Refused(Message):
    """Either side: the connection ends, and why."""

    cause: Text


class Fetch(Message):
    """Consumer asks for the tiers of one transfer, tokens [first_token, num_tokens).

    `step_ms` is its recent decode step time, by which the producer plans; 0: not known.
    """

    transfer_id: Id
    first_token: Count
    num_tokens: Count
    step_ms: Annotated[float, Meta(ge=0, le=600_000)] = 0.0


class Release(Message):
    """Consumer: stop sending and drop the staging (`done`, `cancelled`, ...)."""

    transfer_id: Id
    cause: Text


class Failure(Message):
    """Producer: this transfer cannot be served, and why."""

    transfer_id: Id
    cause: Text


class Prefilled(Message):
    """Producer: the prefill of a transfer that was answered early has ended.

    `first_token` is what it sampled, None where that is not handed over. With a `cause` the
    prefill has failed, and so has the transfer.
    """

    transfer_id: Id
    first_token: TokenId | None = None
    cause: Text = ""


class Prefilling(Message):
    """Producer, now and then: prefills that this connection waits for still run."""


class TablesRequest(Message):
    """Consumer asks for learned tables; answered by `Tables` or `NoTables`."""

    digest: Digest


class Tables(Message):
    """Header of one payload: tables as `KltTables.to_bytes` gives them.

    `digest` names their content, `checksum` is xxh3-64 of the payload.
    """

    digest: Digest
    num_bytes: PayloadBytes
    checksum: Checksum


class NoTables(Message):
    """Producer: these tables are not here, and why."""

    digest: Digest
    cause: Text


class Frame(Message):
    """Header of one payload: one tier of tokens [first_token, first_token + num_tokens).

    Anchor and residual are rows, token-major: row t holds all layers, K and V and heads of one
    token, for the worker's shard. Behind the rows of an anchor come `exceptions` records, vectors
    that travel raw: token offset in the frame and vector index, uint32 each, then the vector's
    bytes. An exact frame is uint32 lengths [num_tokens], then that many bytes a token. All
    numbers are little-endian. `checksum` is xxh3-64 of the payload.
    """

    transfer_id: Id
    tier: Annotated[int, Meta(ge=0, le=2)]
    codec: Id
    first_token: Count
    num_tokens: Annotated[int, Meta(ge=1, le=1 << 32)]
    num_bytes: PayloadBytes
    checksum: Checksum
    exceptions: Annotated[int, Meta(ge=0, le=1 << 27)] = 0


Payload = Frame | Tables
"""Messages that a payload follows."""


def tier_name(tier: int) -> str:
    """A tier's name for logs."""
    return ("anchor", "residual", "exact")[tier]


AnyMessage = (
    Hello
    | Welcome
    | Proof
    | Ready
    | Refused
    | Fetch
    | Release
    | Failure
    | Prefilled
    | Prefilling
    | TablesRequest
    | Tables
    | NoTables
    | Frame
)

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: Message) -> bytearray:
    """One control message as a slot of `SLOT_BYTES`.

    Raises:
        ProtocolError: if the message does not fit.
    """
    body = _encoder.encode(message)
    if len(body) > SLOT_BYTES - _LENGTH.size:
        raise ProtocolError(f"{type(message).__name__} of {len(body)} bytes exceeds a slot")
    slot = bytearray(SLOT_BYTES)
    _LENGTH.pack_into(slot, 0, _MAGIC, len(body))
    slot[_LENGTH.size : _LENGTH.size + len(body)] = body
    return slot


def decode(slot: bytes | bytearray | memoryview) -> AnyMessage:
    """The message in a slot.

    Raises:
        ProtocolError: on anything that is not exactly one valid message.
    """
    if len(slot) != SLOT_BYTES:
        raise ProtocolError(f"a control slot has {SLOT_BYTES} bytes, got {len(slot)}")
    magic, length = _LENGTH.unpack_from(slot, 0)
    if magic != _MAGIC:
        raise ProtocolError(f"not a Lynx message (starts with {magic!r})")
    if length > SLOT_BYTES - _LENGTH.size:
        raise ProtocolError(f"control message claims {length} bytes")
    try:
        return _decoder.decode(memoryview(slot)[_LENGTH.size : _LENGTH.size + length])
    except msgspec.DecodeError as error:
        raise ProtocolError(f"malformed control message: {error}") from None


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
    ports: Annotated[list[Annotated[int, Meta(ge=1, le=65535)]], Meta(min_length=1, max_length=512)]
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


class Handoff(msgspec.Struct, forbid_unknown_fields=False):
    """The prefill's reply in the NIXL shape, as a decode instance reads it.

    Source of the shape: vllm/distributed/kv_transfer/kv_connector/v1/nixl/pull_scheduler.py.
    """

    remote_engine_id: Id
    remote_request_id: Id
    remote_host: Id
    lynx: LynxParams

    @property
    def transfer_id(self) -> str:
        """The producer's name of this transfer."""
        return self.remote_request_id

    def address(self, rank: int) -> tuple[str, int]:
        """Where the producer's worker `rank` listens."""
        return self.remote_host, self.lynx.ports[rank]


class MooncakeLeg(msgspec.Struct, forbid_unknown_fields=False):
    """A decode leg of a router that speaks Mooncake's handoff.

    Source of the shape: mooncake/mooncake_connector.py beside the NIXL connector.
    """

    transfer_id: Id
    remote_engine_id: Id
    remote_bootstrap_addr: Annotated[str, Meta(max_length=256, pattern=r"^https?://[^/?#@\s]+/?\Z")]


class BootstrapAnswer(msgspec.Struct, omit_defaults=True):
    """What a prefill's bootstrap server says of a transfer.

    unknown: no prefill leg has come (or it was long ago). pending: it waits for its turn. ready:
    `handoff` is what a reply in the NIXL shape would carry. failed: `cause` says why.
    """

    state: Literal["unknown", "pending", "ready", "failed"]
    handoff: dict[str, Any] | None = None
    cause: Text = ""


def prompt_digest(token_ids: list[int] | None) -> str:
    """xxh3-64 of a prompt's token ids (int64, little-endian) as hex; empty for None."""
    if token_ids is None:
        return ""
    return xxhash.xxh3_64_hexdigest(np.asarray(token_ids, "<i8").tobytes())


def parse_mooncake_leg(params: dict[str, Any]) -> MooncakeLeg | None:
    """A decode leg in Mooncake's shape; None if it has another one.

    Raises:
        ProtocolError: naming what is missing or wrong.
    """
    if "lynx" in params or "remote_bootstrap_addr" not in params:
        return None
    try:
        leg = msgspec.convert(params, MooncakeLeg)
    except msgspec.ValidationError as error:
        raise ProtocolError(f"malformed kv_transfer_params: {error}") from None
    leg.remote_bootstrap_addr = leg.remote_bootstrap_addr.rstrip("/")
    return leg


def parse_handoff(params: dict[str, Any]) -> Handoff:
    """Validate a decode leg's `kv_transfer_params`.

    Raises:
        ProtocolError: naming what is missing or wrong.
    """
    if "lynx" not in params:
        raise ProtocolError(
            "kv_transfer_params has no key 'lynx': the prefill instance does not run LynxConnector"
        )
    _check_version(params["lynx"])
    try:
        handoff = msgspec.convert(params, Handoff)
    except msgspec.ValidationError as error:
        raise ProtocolError(f"malformed kv_transfer_params: {error}") from None
    lynx = handoff.lynx
    needed = len(lynx.ports) if lynx.codec in TABLE_CODECS else 0
    if len(lynx.tables) != needed:
        raise ProtocolError(
            f"malformed kv_transfer_params: codec {lynx.codec} on {len(lynx.ports)} ranks needs "
            f"{needed} tables, the handoff names {len(lynx.tables)}"
        )
    return handoff


def _check_version(lynx: object) -> None:
    """First of all: another version may lack fields that this one needs."""
    version = lynx.get("version") if isinstance(lynx, dict) else None
    if isinstance(version, int) and version != PROTOCOL_VERSION:
        raise ProtocolError(
            f"prefill speaks Lynx protocol {version}, this instance "
            f"{PROTOCOL_VERSION}: run the same lynx-connector on both sides"
        )
