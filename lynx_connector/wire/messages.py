# SPDX-License-Identifier: Apache-2.0
"""Every message between two Lynx workers.

Control messages are MessagePack by msgspec: typed, of bounded size, never pickle. They travel over
the socket on which two workers met: a prefix (magic and length), then the message. The payload of
`Frame` and `Tables` travels over UCX, in the order of their headers.

Version history:
    1  first version: hello/challenge, fetch by tier order, frames of token-major rows.
    2  learned tables (announced in Welcome, TablesRequest, Tables, NoTables); anchor frames carry
       vectors that travel raw; a third, variable-length tier; the handoff names anchor_bits,
       final_tier and tables.
    3  the first token: in the handoff, or in Prefilled after an early reply; Prefilling; the
       handoff says whether its reply was early, and names the prompt. Fetch names the
       consumer's step time, the handoff how many drafts are worth it.
    4  workers meet on a TCP socket of their own, where all control messages stay; UCX carries
       payloads alone, between endpoints made from worker addresses (Ready, Join, Joined).
       Proofs cover versions and keys; with a secret messages are sealed, with `encrypt` payloads,
       too. Hold: a consumer keeps the lease of what it cannot fetch yet. Prefilling also answers
       a Fetch, so that a producer that hangs is told from a busy one. Sent: a fetch's last frame
       is out, so that a lost one is missed at once. Taken: a consumer has a payload, whatever UCX
       says of it.
"""

import struct
from typing import Annotated

import msgspec
from msgspec import Meta

from lynx_connector.errors import ProtocolError, shown

PROTOCOL_VERSION = 4

PREFIX = struct.Struct("<4sI")
_MAGIC = b"LYNX"
GREETING_BYTES = 1024
"""Largest message of a peer that has proved nothing."""
MESSAGE_BYTES = 20 << 10
"""Largest message of all: one that holds a UCX worker address."""
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
Key = Annotated[bytes, Meta(max_length=32)]
WorkerAddress = Annotated[bytes, Meta(min_length=1, max_length=16 << 10)]
Tag = Annotated[bytes, Meta(min_length=8, max_length=8)]
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


class Hello(Message, forbid_unknown_fields=False):
    """Consumer to producer, first message of a connection. These fields never change.

    Later versions may add some, so that a peer of another version is refused by its version.
    `key` is an ephemeral X25519 public key, empty without `encrypt`.
    """

    version: int
    release: Text
    compat: Text
    peer: Text
    nonce: Nonce
    encrypt: bool = False
    key: Key = b""


class Welcome(Message):
    """Producer's answer: its own identity, and its proof where a secret is configured."""

    version: int
    release: Text
    compat: Text
    peer: Text
    nonce: Nonce
    proof: Nonce
    encrypt: bool = False
    key: Key = b""


class Proof(Message):
    """Consumer's proof."""

    proof: Nonce


class Ready(Message):
    """Producer: the proof holds, and this is where its UCX worker is.

    `tag` marks what the consumer sends to it over UCX: one message, by which it knows that the
    path is open. `data_ports` is the range of its UCX's TCP ports, empty where UCX chooses.
    `tables` names the tables that its next requests will be encoded with, so that a consumer can
    ask for them before it needs them; empty where there are none.
    """

    address: WorkerAddress
    tag: Tag
    data_ports: Text = ""
    tables: MaybeDigest = ""


class Join(Message):
    """Consumer: where its own UCX worker is, and the tag of all payloads for it."""

    address: WorkerAddress
    tag: Tag


class Joined(Message):
    """Producer: the consumer has reached its UCX worker. One UCX message to the consumer follows,
    and then this is a connection."""


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


class Taken(Message):
    """Consumer: it has the payload of the oldest `Frame` or `Tables` that was not answered so."""


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
    | Join
    | Joined
    | Refused
    | Fetch
    | Hold
    | Release
    | Failure
    | Prefilled
    | Prefilling
    | Sent
    | Taken
    | TablesRequest
    | Tables
    | NoTables
    | Frame
)

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: Message) -> bytes:
    """One control message, without its prefix.

    Raises:
        ProtocolError: if the message is too long.
    """
    try:
        body = _encoder.encode(message)
    except UnicodeError:
        raise ProtocolError(f"{type(message).__name__} has a text that is no Unicode") from None
    limit = MESSAGE_BYTES if isinstance(message, Ready | Join) else GREETING_BYTES
    if len(body) > limit:
        raise ProtocolError(f"{type(message).__name__} of {len(body)} bytes, at most {limit} fit")
    return body


def prefix(length: int) -> bytes:
    """What comes before `length` bytes of a message."""
    return PREFIX.pack(_MAGIC, length)


def length_of(prefix: bytes, limit: int) -> int:
    """Bytes of the message behind a prefix.

    Raises:
        ProtocolError: it is none, or announces more than `limit` bytes.
    """
    magic, length = PREFIX.unpack(prefix)
    if magic != _MAGIC:
        raise ProtocolError(
            f"not a Lynx message (starts with {prefix!r}): a stranger, or a lynx-connector that "
            "is older than protocol 4: install the same version on both sides"
        )
    if length > limit:
        raise ProtocolError(f"control message claims {length} bytes")
    return length


def decode(body: bytes) -> AnyMessage:
    """The message in `body`.

    Raises:
        ProtocolError: on anything that is not exactly one valid message.
    """
    try:
        return _decoder.decode(body)
    except DECODE_ERRORS as error:
        raise ProtocolError(f"malformed control message: {shown(str(error))}") from None
