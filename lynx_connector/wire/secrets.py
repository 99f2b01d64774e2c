# SPDX-License-Identifier: Apache-2.0
"""The secrets that peers may prove, read again when their file changes."""

import logging
from pathlib import Path

from lynx_connector.config import parse_secrets

logger = logging.getLogger("vllm.lynx")


class SharedSecrets:
    """The secrets of a file: a producer proves the first, all are accepted.

    So a secret is replaced without a restart: add the new one as a second line everywhere, then
    put it first everywhere, then remove the old one.
    """

    def __init__(self, path: Path | None = None, values: tuple[bytes, ...] = ()):
        self._path = path
        self._values = values
        self._seen: tuple[int, int, int] | None = None
        self._unusable = ""

    def current(self) -> tuple[bytes, ...]:
        """The secrets of now; empty where none is configured. Reads the file if it has changed.

        A file that cannot be used any more leaves the secrets as they were, with a warning.
        """
        if self._path is None:
            return self._values
        try:
            stat = self._path.stat()
            seen = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
            if seen != self._seen:
                self._values = parse_secrets(self._path.read_bytes())
                if self._seen is not None:
                    logger.info(
                        "lynx: secret_file %s was read again: %d secrets", self._path, len(self)
                    )
                self._seen, self._unusable = seen, ""
        except (OSError, ValueError) as error:
            if self._unusable != str(error):
                self._unusable = str(error)
                logger.warning(
                    "lynx: secret_file %s cannot be used, the secrets stay as they were: %s",
                    self._path,
                    error,
                )
        return self._values

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"SharedSecrets({self._path}, {len(self)} secrets)"


NO_SECRETS = SharedSecrets()
