# SPDX-License-Identifier: Apache-2.0
"""A producer's server and bootstrap server in a process of their own, whose CPU and descriptors can
be watched.

    python -m tests.unit.transport.serving [SECRET_FILE]

Prints `{"meeting": PORT, "bootstrap": PORT}`; serves "t000", "t001", ... until its input ends.
"""

import json
import os
import sys
from pathlib import Path

from lynx_connector.producer.bootstrap import BootstrapServer
from lynx_connector.transport.handshake import Identity
from lynx_connector.transport.loop import TransportLoop
from lynx_connector.wire.secrets import SharedSecrets
from tests.unit.transport.pair import Pair

TRANSFERS = 400


def main(secret_file=None):
    loop = TransportLoop("tcp,self")
    loop.start()
    secrets = SharedSecrets(Path(secret_file) if secret_file else None)
    pair = Pair(loop, producer=Identity("compat", "engine/0", secrets), lease=3600)
    for i in range(TRANSFERS):
        pair.stage(f"t{i:03}")
    bootstrap = BootstrapServer(0, "engine")
    print(json.dumps({"meeting": pair.server.port, "bootstrap": bootstrap.port}), flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
