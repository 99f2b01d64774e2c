# SPDX-License-Identifier: Apache-2.0
"""Each fault changes what is sent as its name says, and only where it was switched on."""

import asyncio
import importlib.metadata
import random

import numpy as np
import pytest

from lynx_connector.transport.connection import Connection
from lynx_connector.wire import messages
from tests.scheduler import engine
from tests.soak import transport_faults
from tests.soak.transport_faults import FAULTS, SETTINGS_VARIABLE

PAYLOAD = np.arange(64, dtype=np.uint8)
FRAME = messages.Frame("t", 0, "klt", 0, 4, 64, 1)


class Wires:
    """A connection's socket and UCX path; what it sends, as bytes in order."""

    peer = "peer"
    seals = None

    def __init__(self):
        self.sent = []
        self.arrived = asyncio.Semaphore(0)

    def write(self, message):
        self.sent.append(bytes(messages.encode(message)))

    async def drain(self):
        pass

    async def read(self):
        await self.arrived.acquire()
        return messages.Taken()

    async def send(self, payload):
        self.sent.append(bytes(payload))
        self.arrived.release()


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Faults installed in this process, switched by the file."""
    path = tmp_path / "faults.json"
    monkeypatch.setenv(SETTINGS_VARIABLE, str(path))
    monkeypatch.setattr(Connection, "send", Connection.send)  # restored afterwards
    monkeypatch.setattr(transport_faults, "LATE_SECONDS", (0.01, 0.02))
    transport_faults.install()
    return path


def sent(*parts):
    wires = Wires()

    async def run():
        await Connection(wires, wires).send(*parts)

    asyncio.run(run())
    return wires.sent


def whole():
    return [bytes(messages.encode(FRAME)), PAYLOAD.tobytes()]


def test_nothing_happens_without_settings_or_with_none(settings):
    assert sent(FRAME, PAYLOAD) == whole()
    transport_faults.write_settings(settings, 0)
    assert sent(FRAME, PAYLOAD) == whole()
    assert transport_faults.noted(settings) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_does_what_it_is_called(settings, fault):
    transport_faults.write_settings(settings, 1, (fault,))
    header, *payloads = sent(FRAME, PAYLOAD) or [b""]
    assert [note["fault"] for note in transport_faults.noted(settings)] == [fault]
    if fault == "lost":
        assert (header, payloads) == (b"", [])
        return
    assert header == whole()[0]
    if fault == "flipped":
        differ = np.frombuffer(payloads[0], np.uint8) ^ PAYLOAD
        assert sum(int(byte).bit_count() for byte in differ) == 1
    elif fault == "cut":
        assert payloads == [PAYLOAD.tobytes()[:32]]
    elif fault == "repeated":
        assert [header, *payloads] == whole() * 2
    else:
        assert payloads == [PAYLOAD.tobytes()]
    assert PAYLOAD[0] == 0 and PAYLOAD[63] == 63  # what is staged stays whole


def test_control_messages_are_left_alone(settings):
    transport_faults.write_settings(settings, 1, ("lost",))
    ready = messages.Joined()
    assert sent(ready) == [bytes(messages.encode(ready))]


def test_one_frame_in_so_many_is_hit(tmp_path):
    path = tmp_path / "faults.json"
    transport_faults.write_settings(path, 16)
    injector = transport_faults.Injector(path, random.Random(1))
    hits = [injector.choose(FRAME, PAYLOAD) for _ in range(3200)]
    assert 150 < sum(hit is not None for hit in hits) < 250
    assert set(hits) == {None, *FAULTS}


def test_unknown_faults_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no transport fault eaten"):
        transport_faults.write_settings(tmp_path / "faults.json", 16, ("eaten",))


def test_vllm_finds_the_plugin_in_its_folder(tmp_path):
    folder = transport_faults.write_plugin(tmp_path / "plugin")
    (found,) = importlib.metadata.distributions(path=[str(folder)])
    (entry,) = found.entry_points
    assert entry.group == "vllm.general_plugins"
    assert entry.load() is transport_faults.install


def test_servers_with_adapters_have_the_kernels_mended(tmp_path):
    folder = transport_faults.write_plugin(tmp_path / "plugin", adapters=True)
    (found,) = importlib.metadata.distributions(path=[str(folder)])
    assert {entry.load() for entry in found.entry_points} == {
        transport_faults.install,
        engine.spare_base_requests,
    }
