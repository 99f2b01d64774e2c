# SPDX-License-Identifier: Apache-2.0
"""A peer that says nonsense of where its UCX worker is: an error, and the process lives."""

import subprocess
import sys

TRIES = """
import asyncio, os, random
from lynx_connector.transport.data_path import DataPath, worker_address
from lynx_connector.transport.loop import TransportLoop

rng = random.Random(7)

def mutated(own):
    kind = rng.randrange(5)
    if kind == 0:
        return rng.randbytes(rng.randrange(1, 2 * len(own)))
    if kind == 1:
        return own[:1] + rng.randbytes(len(own) - 1)
    if kind == 2:
        return own[: rng.randrange(1, len(own))]
    if kind == 3:
        return bytes(len(own))
    flipped = bytearray(own)
    for _ in range(rng.choice((1, 1, 8))):
        flipped[rng.randrange(len(own))] ^= 1 << rng.randrange(8)
    return bytes(flipped)

async def main():
    own, refused = worker_address(), 0
    for _ in range(400):
        try:
            path = await DataPath.to(mutated(own), b"s" * 8, b"r" * 8)
        except ConnectionError:
            refused += 1
        else:
            await path.close()
    path = await DataPath.to(own, b"s" * 8, b"s" * 8)  # and it still works
    await asyncio.gather(path.knock(), path.answer())
    print(refused, flush=True)

loop = TransportLoop("tcp,self")
loop.start()
loop.run(main())
os._exit(0)
"""


def test_malformed_worker_addresses():
    done = subprocess.run(
        [sys.executable, "-c", TRIES], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) > 200
