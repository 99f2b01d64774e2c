# SPDX-License-Identifier: Apache-2.0
"""Meets a producer as a consumer would, and says how that went: one JSON object, or the cause.

    python -m lynx_connector.transport.probe HOST PORT [SECRET_FILE]

A process of its own for `lynx doctor`: UCX may crash it.
"""

import json
import os
import sys
from pathlib import Path

from lynx_connector.errors import LynxError
from lynx_connector.transport.address import Resolver
from lynx_connector.transport.handshake import PROBE, Identity
from lynx_connector.transport.loop import TransportLoop
from lynx_connector.transport.meeting import meet
from lynx_connector.wire.secrets import SharedSecrets


def main(host: str, port: str, secret_file: str | None = None) -> int:
    """Exit status 1, and the cause on standard error, where a consumer would fail."""
    secrets = SharedSecrets(Path(secret_file) if secret_file else None)
    identity = Identity(PROBE, "lynx doctor", secrets)

    async def probe() -> dict[str, object]:
        connection, welcome, ready = await meet((host, int(port)), identity, Resolver())
        await connection.close()
        return {
            "peer": welcome.peer,
            "release": welcome.release,
            "secret": bool(welcome.proof),
            "data_ports": ready.data_ports,
        }

    loop = TransportLoop()
    try:
        loop.start()
        print(json.dumps(loop.run(probe())), flush=True)
    except LynxError as error:
        print(error, file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    status = main(*sys.argv[1:])
    os._exit(status)  # UCX may hang at its end
