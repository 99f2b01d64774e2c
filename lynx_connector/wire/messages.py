# SPDX-License-Identifier: Apache-2.0
"""Every message between two Lynx workers.

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
    4  Hold: a consumer keeps the lease of what it cannot fetch yet. Prefilling also answers a
       Fetch, so that a producer that hangs is told from a busy one.
    5  Sent: a fetch's last frame is out, so that a lost one is missed at once.
"""

import struct
from typing import Annotated

import msgspec
from msgspec import Meta

from lynx_connector.errors import ProtocolError, shown

PROTOCOL_VERSION = 5

SLOT_BYTES = 1024
_LENGTH = struct.Struct("<4sI")
_MAGIC = b"LYNX"
MAX_CAUSE = 240
MAX_HELD = 6  # ids of full length in one slot

Text = Annotated[str, Meta(max_length=256)]
# Ids get into logs and files: no control characters, and no lone surrogates, which have no UTF-8.
Id = Annotated[
    str,
    Meta(
        min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+\Z"
    ),
]
Count = Annotated[int, Meta(ge=0, le=1 << 40)]
Nonce = Annotated[bytes, Meta(max_length=64)]
PayloadBytes = Annotated[int, Meta(ge=1, le=1 << 30)]
Checksum = Annotated[int, Meta(ge=0)]
TokenId = Annotated[int, Meta(ge=0, lt=1 << 31)]
# Digests become file names: nothing but hex digits may pass. \Z, since $ allows a final newline.
Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]
MaybeDigest = Annotated[str, Meta(pattern=r"^(?:[0-9a-f]{32})?\Z")]


DECODE_ERRORS = (msgspec.DecodeError, UnicodeError, RecursionError)
"""What msgspec raises on foreign bytes: malformed, not UTF-8, nested too deep."""


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


class Hold(Message):
    """Consumer: it will fetch these transfers, or release them; until then their leases start
    anew. Unknown ones are passed over."""

    transfer_ids: Annotated[list[Id], Meta(min_length=1, max_length=MAX_HELD)]


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
    """Producer: it is at work. At once after a Fetch, and now and then while prefills that this
    connection waits for still run."""


class Sent(Message):
    """Producer: every frame that a Fetch asked for was sent before this."""

    transfer_id: Id


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
    | Hold
    | Release
    | Failure
    | Prefilled
    | Prefilling
    | Sent
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
    try:
        body = _encoder.encode(message)
    except UnicodeError:
        raise ProtocolError(f"{type(message).__name__} has a text that is no Unicode") from None
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
        raise ProtocolError(f"not a Lynx message (starts with {bytes(magic)!r})")
    if length > SLOT_BYTES - _LENGTH.size:
        raise ProtocolError(f"control message claims {length} bytes")
    try:
        return _decoder.decode(memoryview(slot)[_LENGTH.size : _LENGTH.size + length])
    except DECODE_ERRORS as error:
        raise ProtocolError(f"malformed control message: {shown(str(error))}") from None
