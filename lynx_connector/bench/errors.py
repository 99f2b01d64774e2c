# SPDX-License-Identifier: Apache-2.0
"""What a benchmark refuses."""

from lynx_connector.errors import LynxError


class BenchError(LynxError, ValueError):
    """A text, folder or name that cannot be measured; one line says which and why."""
