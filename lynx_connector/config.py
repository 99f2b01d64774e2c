# SPDX-License-Identifier: Apache-2.0
"""LynxConfig: the validated `kv_connector_extra_config` of LynxConnector.

Every key has a type, a range, a default and a unit; an unknown key or a wrong value is refused at
start-up with a message that names the key, the value and what is accepted.
"""

import difflib
import enum
import ipaddress
import os
import re
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from lynx_connector.errors import ConfigError

EXACT_FIRST_TOKENS = 1
"""Tokens at the prompt's start sent uncompressed: one sink token is as good as four (measured)."""

CODEC_NAMES = ("klt", "hadamard", "bf16", "int8", "int4")

ONE_TIER_CODECS = ("bf16", "int8", "int4")
"""Codecs whose anchor is all there is: nothing to start early on, nothing to refine."""

FALLBACK_CODEC = "hadamard"
"""What `klt` is replaced by while no tables have been learned."""

DEFAULT_ANCHOR_BITS = 4

FIRST_TABLES_TOKENS = 2048
"""Tokens after which the first tables are built; the last ones follow at `learn_tokens`."""

MIN_LEARN_TOKENS = 512
"""Fewer tokens than that do not fill the covariances of the larger head sizes."""


MIN_SECRET_BYTES = 16


class StartMode(enum.StrEnum):
    """What a decode instance waits for before it decodes."""

    AUTO = "auto"
    SPECULATIVE = "speculative"
    BLOCKING = "blocking"


class PlanMode(enum.StrEnum):
    """Who decides how a request's KV is sent."""

    AUTO = "auto"
    FIXED = "fixed"


class FinalTier(enum.StrEnum):
    """The tier that verification waits for."""

    RESIDUAL = "residual"
    EXACT = "exact"


class LynxConfig(BaseModel):
    """Every key of `kv_connector_extra_config`, for both roles unless the description says one."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    codec: str = Field(
        "klt",
        description="Producer: how KV is sent. `klt` (two tiers, with tables learned from the "
        "prompts; `hadamard` until there are any), `hadamard` (two tiers, no tables), `bf16` "
        "(the cache's own dtype, uncompressed), `int8`, `int4` (one tier).",
    )
    anchor_bits: Annotated[int, Field(ge=3, le=5)] = Field(
        DEFAULT_ANCHOR_BITS,
        description="Producer: bits an element in the anchor of `klt`; anchor and residual are "
        "8 bits together.",
    )
    final_tier: FinalTier = Field(
        FinalTier.RESIDUAL,
        description="Producer: what verification waits for. `residual`: the 8-bit cache; `exact`: "
        "a third tier that restores every bit of the cache.",
    )
    plan: PlanMode = Field(
        PlanMode.FIXED,
        description="Producer: `auto` chooses per request, once the link has been measured, "
        "between `codec` (of `klt` any anchor_bits) and `bf16`, whichever brings the 32nd token "
        "sooner; `fixed` always sends as configured. Neither lowers `final_tier`.",
    )
    learn_tokens: Annotated[int, Field(ge=0, le=1 << 20)] = Field(
        8192,
        description="Producer: prompt tokens from which `klt` learns its tables; 0 learns nothing "
        f"(tables in `tables_dir` are used all the same), else at least {MIN_LEARN_TOKENS}.",
    )
    tables_dir: Path | None = Field(
        None,
        description="Folder of learned tables, so that a restart begins with them. Default: "
        "lynx-connector/tables in $XDG_CACHE_HOME or ~/.cache. Where there is no such folder, or "
        "none that can be written, a restart begins without tables.",
    )
    start: StartMode = Field(
        StartMode.AUTO,
        description="Consumer: `speculative` starts on the anchor (needs LynxScheduler), "
        "`blocking` waits for the final tier, `auto` is speculative where LynxScheduler runs. "
        'A request overrides it with `vllm_xargs: {"lynx_start": ...}`.',
    )
    draft_limit: Annotated[int, Field(ge=1, le=1024)] = Field(
        64, description="Consumer: most tokens drafted before verification, per request."
    )
    first_token: bool = Field(
        True,
        description="Producer: hand over the token that the prefill sampled; consumer (with "
        "LynxScheduler): emit it before any KV has arrived. Not for requests where that would not "
        "be exact or complete: logprobs, n > 1, structured output, a seed on vLLM's V1 runner.",
    )
    verify_rows: Annotated[int, Field(ge=1, le=256)] = Field(
        8,
        description="Consumer: one-token rows per verification step, for requests that are not "
        "plain greedy.",
    )
    exact_last_tokens: Annotated[int, Field(ge=0, le=1024)] = Field(
        16,
        description="Producer: tokens at the prompt's end sent uncompressed (so is token 0).",
    )
    listen_port: Annotated[int, Field(ge=0, le=65000)] = Field(
        0,
        description="Producer: TCP port on which its workers meet consumers. Tensor parallel rank "
        "r of data parallel rank d listens on listen_port + d x tensor parallel size + r. 0 takes "
        "any free port.",
    )
    listen_host: str | None = Field(
        None,
        description="Producer: host name or address of the interface that it listens on. Default: "
        "all, or loopback alone where advertise_host is loopback.",
    )
    data_ports: str | None = Field(
        None,
        description="TCP ports that UCX may take for payloads, `FIRST-LAST`: at least one for each "
        "worker on this host and network interface. Default: UCX takes any.",
    )
    advertise_host: str | None = Field(
        None,
        description="Producer: host name or address that consumers connect to. Default: "
        "VLLM_HOST_IP or vLLM's guess of this host's address.",
    )
    frame_bytes: ByteSize = Field(
        ByteSize(1 << 20), description="Producer: largest payload of a frame, 64KiB to 64MiB."
    )
    staging_bytes: ByteSize = Field(
        ByteSize(4 << 30),
        description="Host memory for encoded tiers, per worker. When it is full, prefills "
        "(producer) or fetches (consumer) wait for room.",
    )
    reuse_bytes: ByteSize = Field(
        ByteSize(1 << 30),
        description="Producer: host memory, per worker, for encoded tiers of blocks that vLLM may "
        "find in its prefix cache again; those are not encoded a second time. 0 keeps none.",
    )
    early_reply: bool = Field(
        True,
        description="Producer: answer the router when a prefill is first scheduled, so that its "
        "KV crosses the network while it runs (needs LynxScheduler); else when it has ended.",
    )
    waiting_tokens: Annotated[int, Field(ge=0)] = Field(
        0,
        description="Consumer: most prompt tokens whose KV blocks are held by requests that wait "
        "for a prefill that still runs; more of them wait without blocks. 0: half of the cache.",
    )
    bootstrap_port: Annotated[int, Field(ge=0, le=65535)] = Field(
        0,
        description="Producer: TCP port of the HTTP server for routers that speak Mooncake's "
        "handoff (`GET /query`, `transfer_id`); 0: none.",
    )
    bootstrap_wait_seconds: Annotated[float, Field(gt=0, le=3600)] = Field(
        10.0,
        description="Consumer: how long a prefill leg in Mooncake's shape may stay away after its "
        "decode leg has come, before the load fails.",
    )
    staging_wait_seconds: Annotated[float, Field(ge=0, le=3600)] = Field(
        60.0,
        description="Producer: how long a prefill waits for room in staging before it starts "
        "without.",
    )
    lease_seconds: Annotated[float, Field(gt=0, le=86400)] = Field(
        120.0,
        description="Producer: how long finished tiers wait without contact before they are "
        "dropped.",
    )
    transfer_timeout_seconds: Annotated[float, Field(gt=0, le=86400)] = Field(
        60.0, description="Consumer: longest silence of a producer within one transfer."
    )
    link_mbit: Annotated[float, Field(ge=0)] = Field(
        0.0, description="Producer: rate limit of the sender in Mbit/s; 0 sends at full speed."
    )
    secret_file: Path | None = Field(
        None,
        description="File with a secret that both sides share; peers then prove it by HMAC "
        "before a byte of KV moves, and control messages are encrypted. Further lines are "
        "accepted, too; read again when it changes.",
    )
    encrypt: bool = Field(
        False,
        description="Encrypt payloads, too (AES-256-GCM; needs secret_file). One side that asks "
        "for it is enough.",
    )
    allowed_prefills: tuple[str, ...] = Field(
        (),
        description="Consumer: addresses, networks (10.0.0.0/8) and host names that prefills may "
        "have; a request that names another one is refused, and nothing is connected. Empty: any.",
    )
    model_id: str | None = Field(
        None,
        description="Name of the weights that both sides must agree on, instead of a fingerprint "
        "of their files, or of hub name and revision. The configuration (--hf-overrides, "
        "--quantization, --dtype) is compared all the same.",
    )
    events_file: Path | None = Field(
        None, description="Append one JSON object a line for every step of every request."
    )
    ucx_tls: str | None = Field(
        None, description="UCX transports (UCX_TLS) if the environment sets none, e.g. `tcp,self`."
    )

    @field_validator("codec")
    @classmethod
    def _known_codec(cls, value: str) -> str:
        if value not in CODEC_NAMES:
            raise ValueError(f"accepted values are {', '.join(CODEC_NAMES)}")
        return value

    @field_validator("learn_tokens")
    @classmethod
    def _enough_to_learn(cls, value: int) -> int:
        if 0 < value < MIN_LEARN_TOKENS:
            raise ValueError(f"accepted values are 0 and {MIN_LEARN_TOKENS} or more")
        return value

    @field_validator("frame_bytes")
    @classmethod
    def _frame_range(cls, value: ByteSize) -> ByteSize:
        if not 64 << 10 <= value <= 64 << 20:
            raise ValueError("accepted values are 64KiB to 64MiB")
        return value

    @field_validator("staging_bytes")
    @classmethod
    def _staging_range(cls, value: ByteSize) -> ByteSize:
        if value < 1 << 20:
            raise ValueError("accepted values are 1MiB and above")
        return value

    @field_validator("data_ports")
    @classmethod
    def _port_range(cls, value: str | None) -> str | None:
        if value is not None:
            first, _, last = value.partition("-")
            if not (
                first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last) <= 65535
            ):
                raise ValueError("accepted is FIRST-LAST, e.g. 7700-7731")
        return value

    @field_validator("allowed_prefills")
    @classmethod
    def _hosts_or_networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for entry in value:
            if "/" in entry:
                ipaddress.ip_network(entry)
            elif not re.fullmatch(r"[\w.:-]{1,253}", entry.strip("[]")):
                raise ValueError(f"{entry!r} is no host name, address or network")
        return value

    @field_validator("secret_file")
    @classmethod
    def _readable_secret(cls, value: Path | None) -> Path | None:
        if value is not None:
            try:
                parse_secrets(value.read_bytes())
            except OSError as error:
                raise ValueError(f"cannot be read: {error.strerror}") from error
        return value

    @model_validator(mode="after")
    def _matching(self) -> Self:
        if self.final_tier is FinalTier.EXACT and self.codec in ("int8", "int4"):
            raise ValueError(
                f"final_tier = 'exact' does not go with codec = {self.codec!r}, which has no "
                "residual; use klt, hadamard or bf16"
            )
        if self.anchor_bits != DEFAULT_ANCHOR_BITS and self.codec != "klt":
            raise ValueError(
                f"anchor_bits = {self.anchor_bits} goes with codec = 'klt' only, "
                f"not with {self.codec!r}"
            )
        if self.encrypt and self.secret_file is None:
            raise ValueError("encrypt = true needs secret_file")
        return self

    @classmethod
    def from_extra_config(cls, extra: dict[str, Any]) -> "LynxConfig":
        """Validate a `kv_connector_extra_config`.

        Raises:
            ConfigError: one line per wrong key, with the value and what is accepted.
        """
        try:
            return cls.model_validate(extra)
        except ValidationError as error:
            lines = [_explain(issue, cls.model_fields) for issue in error.errors()]
            raise ConfigError("; ".join(lines)) from None

    def listens_on(self) -> str:
        """Host whose interfaces are listened on; empty: all."""
        if self.listen_host is not None:
            return self.listen_host
        advertised = (self.advertise_host or "").strip("[]")
        try:
            loopback = ipaddress.ip_address(advertised).is_loopback
        except ValueError:
            loopback = advertised == "localhost"
        return advertised if loopback else ""

    def exposures(self, producer: bool, consumer: bool) -> list[str]:
        """What strangers could do to an instance of these roles, a sentence each."""
        found = []
        if self.secret_file is None:
            if producer and self.listens_on() in ("", "0.0.0.0", "::"):
                found.append(
                    "no secret_file: whoever reaches this instance's ports can fetch KV; set one, "
                    "or listen_host"
                )
            if consumer and not self.allowed_prefills:
                found.append(
                    "neither secret_file nor allowed_prefills: whoever sends requests to this "
                    "instance can make it connect to any host"
                )
        return found

    def tables_root(self) -> Path | None:
        """`tables_dir`, or its default; None where there is no such folder, as for a user without
        a home."""
        chosen = self.tables_dir
        if chosen is None:
            cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
            if not cache.is_absolute() and cache.parts[:1] != ("~",):
                cache = Path("~/.cache")  # by the XDG rules a relative path counts for nothing
            chosen = cache / "lynx-connector" / "tables"
        try:
            root = chosen.expanduser()
        except RuntimeError:
            return None
        return root if self.tables_dir is not None or root.is_absolute() else None


def parse_secrets(content: bytes) -> tuple[bytes, ...]:
    """The secrets in a file: of a text one a line, of anything else the whole.

    Raises:
        ValueError: one of them is short, or there is none.
    """
    try:
        lines = content.decode("ascii").split("\n")
        secrets = [line.strip().encode() for line in lines if line.strip()]
    except UnicodeDecodeError:
        secrets = [content.strip()]
    if not secrets or min(map(len, secrets)) < MIN_SECRET_BYTES:
        raise ValueError(
            f"each line of the file must hold a secret of at least {MIN_SECRET_BYTES} bytes"
        )
    return tuple(secrets)


def _explain(issue: Any, known: dict[str, Any]) -> str:
    if not issue["loc"]:  # two keys that do not go together: the message names both
        return f"kv_connector_extra_config: {issue['msg']}"
    key = str(issue["loc"][0])
    where = f"kv_connector_extra_config.{key} = {issue['input']!r}"
    if issue["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
        return f"{where}: unknown key; {hint}"
    return f"{where}: {issue['msg']}"
