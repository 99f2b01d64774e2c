# SPDX-License-Identifier: Apache-2.0
"""Landed tiers into the paged cache: decode rows, put raw vectors over them, apply exact tiers."""

from lynx_kernels.shared.paged import PagedKVCache

from lynx_connector.codec import Codec, CodecError, Tier
from lynx_connector.codec.cache import CodecCache
from lynx_connector.codec.exact import ExactTier
from lynx_connector.codec.types import RowLayout
from lynx_connector.consumer.inbound import InboundTransfer, LandedRows
from lynx_connector.consumer.tables import ConsumerTables


class TierWriter:
    """Writes on the main thread, in the order in which rows landed."""

    def __init__(self, cache: PagedKVCache, codecs: CodecCache, tables: ConsumerTables):
        self._cache = cache
        self._codecs = codecs
        self._tables = tables

    def ready(self, transfer: InboundTransfer) -> bool:
        """Whether the transfer's rows can be decoded: its tables, if it needs any, are here.

        Raises:
            CodecError: the tables do not fit this model.
        """
        waiting = [p for p in transfer.buffers.pieces if isinstance(p.codec, RowLayout)]
        if not waiting:
            return True
        tables = self._tables.get(transfer.tables)
        if tables is None:
            return False
        for piece in waiting:
            piece.codec = self._codecs.get(piece.codec.name, transfer.load.anchor_bits, tables)
        return True

    def write(self, transfer: InboundTransfer, rows: LandedRows) -> None:
        """Decode rows into the cache: the anchor at once if drafting starts on it, else only
        together with the residual; the exact tier in place.

        Raises:
            CodecError: the exact tier does not lead to the bits that its checksum names.
        """
        piece, tier, tokens = rows.piece, rows.tier, rows.tokens
        codec = piece.codec
        if not isinstance(codec, Codec):
            raise CodecError(f"codec {codec.name}: its tables are missing")
        slots = transfer.slots_for(tokens)
        if rows.exact is not None:
            ExactTier(codec).decode(
                rows.exact.data,
                rows.exact.lengths,
                self._cache,
                slots,
                piece.view(Tier.ANCHOR, tokens),
            )
        elif tier is codec.tiers[-1] or transfer.load.speculative:
            tiers = [piece.view(t, tokens) for t in codec.tiers if t <= tier]
            codec.decode(tiers, self._cache, slots, tokens.start)
            if (raw := piece.raw_vectors(tokens)) is not None:
                here = slots[raw.tokens - tokens.start]
                self._cache.scatter_vectors(here, raw.vectors, raw.data)
        transfer.mark_written(rows)
