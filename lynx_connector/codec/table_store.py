# SPDX-License-Identifier: Apache-2.0
"""Learned tables on disk: what a producer learned, and what a consumer fetched.

    <root>/<key of the model>/rank<r>-of-<n>/<digest>.tables     one version each
                                               current.json        which one a producer uses

Files are written beside and renamed, so that two processes may share a folder. A file that cannot
be used is ignored with one warning; a folder that cannot be written costs only the warmth of the
next start.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from lynx_connector.codec.klt_tables import KltTables
from lynx_connector.codec.types import CodecError, KVGeometry
from lynx_connector.wire.messages import DECODE_ERRORS, Digest

logger = logging.getLogger("vllm.lynx.tables")

MAX_FILES = 16
"""Versions kept per folder; the oldest beyond it are deleted."""

CURRENT = "current.json"
_DIGEST = re.compile(r"[0-9a-f]{32}")


class Current(msgspec.Struct):
    """Content of `current.json`: a digest, and the tokens that its tables were learned from."""

    digest: Digest
    tokens: Annotated[int, Meta(ge=0)]


def tables_folder(root: Path, key: str, rank: int, size: int) -> Path:
    """Where the tables of one shard of one model lie."""
    return root / key / f"rank{rank}-of-{size}"


def store_tables(
    root: Path, key: str, rank: int, size: int, tables: KltTables, *, tokens: int
) -> Path:
    """Write tables and make them the ones that the next start of a producer begins with.

    tokens: how many they were learned from; a producer with a larger `learn_tokens` learns anew.
    Returns the file's path.

    Raises:
        OSError: the folder cannot be written.
    """
    return _store(tables_folder(root, key, rank, size), tables, tokens)


def _store(folder: Path, tables: KltTables, tokens: int) -> Path:
    path = _write_tables(folder, tables)
    _write(folder / CURRENT, msgspec.json.encode(Current(tables.digest, tokens)))
    return path


class TableStore:
    """One shard's folder. Safe to share between threads and processes.

    Without a root nothing is kept and nothing is found; one warning says so.
    """

    def __init__(self, root: Path | None, key: str, rank: int, size: int, geometry: KVGeometry):
        self.folder = None if root is None else tables_folder(root, key, rank, size)
        self._geometry = geometry
        self._warned: set[Path] = set()
        if self.folder is None:
            logger.warning(
                "lynx: learned tables are not kept for the next start: this user has no home "
                "folder; set tables_dir in kv_connector_extra_config"
            )

    def load(self, digest: str) -> KltTables | None:
        """The tables of a digest, or None where they are not here or not usable."""
        if not _DIGEST.fullmatch(digest):
            return None
        if self.folder is None:
            return None
        path = self.folder / f"{digest}.tables"
        data = self._read(path)
        if data is None:
            return None
        try:
            tables = KltTables.from_bytes(data, self._geometry)
            if tables.digest != digest:
                raise CodecError(f"content has digest {tables.digest}")
        except CodecError as error:
            self._warn(path, f"ignored: {error}")
            return None
        return tables

    def load_current(self) -> tuple[KltTables, int] | None:
        """(tables, tokens they were learned from) that a producer begins with, if any."""
        if self.folder is None:
            return None
        path = self.folder / CURRENT
        data = self._read(path)
        if data is None:
            return None
        try:
            current = msgspec.json.decode(data, type=Current)
        except DECODE_ERRORS as error:
            self._warn(path, f"ignored: {error}")
            return None
        tables = self.load(current.digest)
        return None if tables is None else (tables, current.tokens)

    def save(self, tables: KltTables) -> None:
        """Keep tables for the next start; a failure is a warning."""
        if self.folder is None:
            return
        try:
            _write_tables(self.folder, tables)
        except OSError as error:
            self._warn(self.folder, f"cannot be written: {error.strerror or error}")

    def save_current(self, tables: KltTables, tokens: int) -> None:
        """As `store_tables`; a failure is a warning."""
        if self.folder is None:
            return
        try:
            _store(self.folder, tables, tokens)
        except OSError as error:
            self._warn(self.folder, f"cannot be written: {error.strerror or error}")

    def _read(self, path: Path) -> bytes | None:
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn(path.parent, f"cannot be read: {error.strerror or error}")
            return None

    def _warn(self, path: Path, what: str) -> None:
        if path not in self._warned:
            self._warned.add(path)
            logger.warning("lynx: learned tables: %s %s", path, what)


def _write_tables(folder: Path, tables: KltTables) -> Path:
    path = folder / f"{tables.digest}.tables"
    _write(path, tables.to_bytes())
    _prune(folder, keep=path)
    return path


def _write(path: Path, data: bytes) -> None:
    """Readers see the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _prune(folder: Path, keep: Path) -> None:
    """Delete the oldest versions beyond MAX_FILES, but not `keep` or the current one."""
    try:
        current = msgspec.json.decode((folder / CURRENT).read_bytes(), type=Current).digest
    except (OSError, *DECODE_ERRORS):
        current = ""
    ages: list[tuple[float, Path]] = []
    for path in folder.glob("*.tables"):
        try:
            ages.append((path.stat().st_mtime, path))
        except FileNotFoundError:  # another process was quicker
            continue
    for _, path in sorted(ages, reverse=True)[MAX_FILES:]:
        if path != keep and path.stem != current:
            path.unlink(missing_ok=True)
