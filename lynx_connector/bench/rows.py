# SPDX-License-Identifier: Apache-2.0
"""The table's rows: which codecs are measured, and under what name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lynx_connector.bench.baselines import BASELINES
from lynx_connector.bench.errors import BenchError
from lynx_connector.bench.methods import BaselineMethod, CodecMethod, Method
from lynx_connector.codec import CODECS, KltTables, KVGeometry, get_codec

Build = Callable[[KVGeometry, KltTables | None], Method]


@dataclass(frozen=True)
class Row:
    """One row. `build` makes its method; `tables`: whether it needs learned tables."""

    name: str
    build: Build
    tables: bool = False


def _codec_row(name: str) -> Row:
    return Row(name, lambda geometry, tables: CodecMethod(get_codec(name, geometry)))


def _klt_row(name: str, anchor_bits: int, exact: bool = False) -> Row:
    def build(geometry: KVGeometry, tables: KltTables | None) -> Method:
        codec = get_codec("klt", geometry, anchor_bits=anchor_bits, tables=tables)
        return CodecMethod(codec, exact)

    return Row(name, build, tables=True)


def _baseline_row(name: str) -> Row:
    return Row(name, lambda geometry, tables: BaselineMethod(BASELINES[name]()))


ROWS: dict[str, Row] = {
    row.name: row
    for row in [
        *(_codec_row(name) for name in CODECS if name != "klt"),
        _klt_row("klt-3bit", 3),
        _klt_row("klt", 4),
        _klt_row("klt-5bit", 5),
        _klt_row("klt+exact", 4, exact=True),
        *(_baseline_row(name) for name in BASELINES),
    ]
}
"""All rows by name, in the table's order."""


def select_rows(names: Sequence[str]) -> list[Row]:
    """The rows of these names, all where there are none. Raises BenchError for an unknown one."""
    for name in names:
        if name not in ROWS:
            near = difflib.get_close_matches(name, ROWS, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise BenchError(f"--codec {name}: {hint}known: {', '.join(ROWS)}")
    return [row for name, row in ROWS.items() if not names or name in names]
