# SPDX-License-Identifier: Apache-2.0
"""The events file and what befalls files: serving goes on, with one warning a trouble."""

import errno
import json
import logging
import os
import subprocess
import threading

import pytest

from lynx_connector.telemetry import events_file
from lynx_connector.telemetry.events import EventLog
from lynx_connector.telemetry.metrics import PRODUCER, Meter
from lynx_connector.telemetry.trace import read_events


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(events_file, "_now", clock)
    return clock


@pytest.fixture
def said(caplog):
    """Log lines so far."""
    caplog.set_level(logging.INFO, "vllm.lynx")
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.fixture
def meter():
    return Meter()


def lost(meter):
    return meter.take().get("lost_events", {}).get("producer", 0)


def recovered(lines):
    return [line for line in lines if "is written again" in line]


@pytest.fixture
def broken(monkeypatch):
    """Make writes fail: `broken(errno, after=bytes that still go through)`, `broken(None)`."""
    real = os.write
    state: dict[str, int | None] = {"error": None, "room": 0}

    def write(fd, data):
        if state["error"] is None:
            return real(fd, data)
        if state["room"]:
            part = bytes(data)[: state["room"]]
            state["room"] = 0
            return real(fd, part)
        raise OSError(state["error"], os.strerror(state["error"]))

    monkeypatch.setattr(events_file.os, "write", write)

    def set_to(error, after=0):
        state.update(error=error, room=after)

    return set_to


TROUBLES = [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EPIPE, errno.EFBIG]


@pytest.mark.parametrize("trouble", TROUBLES, ids=errno.errorcode.get)
def test_serving_goes_on_and_the_file_when_it_can(tmp_path, clock, said, meter, broken, trouble):
    path = tmp_path / "events"
    events = EventLog(path, PRODUCER, meter)
    events("fetch", "r1")
    broken(trouble, after=20)
    for _ in range(50):
        events("fetch", "r2")
        clock.now += 0.3
    assert len(said()) == 1
    assert str(path) in said()[0] and os.strerror(trouble) in said()[0]
    assert lost(meter) == 50
    broken(None)
    for number in range(20):
        clock.now += 1.1
        events("fetch", f"s{number}")
    assert len(recovered(said())) == 1 and "50 events were lost" in said()[-1]
    assert len(said()) == 2
    events.close()
    read = read_events([path])
    assert [e["request"] for e in read] == ["r1", *(f"s{number}" for number in range(20))]
    assert read.unreadable == 1  # r2's first 20 bytes, on a line of their own


def test_a_disk_that_is_nearly_full_does_not_flood_the_log(tmp_path, clock, said, broken):
    """Short lines fit, long ones do not: still one trouble."""
    events = EventLog(tmp_path / "events", PRODUCER)
    for _ in range(20):
        broken(errno.ENOSPC)
        events("fetch", "long")
        clock.now += 1.5
        broken(None)
        events("fetch", "short")
        clock.now += 1.5
    assert len(said()) == 1


def test_the_next_trouble_is_told_again(tmp_path, clock, said, broken):
    events = EventLog(tmp_path / "events", PRODUCER)
    for trouble in (errno.ENOSPC, errno.EIO):
        broken(trouble)
        events("fetch", "r")
        broken(None)
        for _ in range(2):
            clock.now += 10
            events("fetch", "r")
    assert len(said()) == 4
    assert os.strerror(errno.EIO) in said()[2]


def test_a_device_that_is_always_full(said):
    events = EventLog("/dev/full", PRODUCER)
    for _ in range(3):
        events("fetch", "r")
    assert len(said()) == 1 and "No space left" in said()[0]
    events.close()


@pytest.mark.parametrize("kind", ["no folder", "a folder", "a link to nowhere", "below a file"])
def test_a_file_that_cannot_be_opened_is_made_when_it_can(tmp_path, clock, said, meter, kind):
    path = tmp_path / "logs" / "events"
    if kind == "a folder":
        path.mkdir(parents=True)
    elif kind == "a link to nowhere":
        path.parent.mkdir()
        path.symlink_to(tmp_path / "nowhere" / "events")
    elif kind == "below a file":
        path.parent.write_text("")
    events = EventLog(path, PRODUCER, meter)
    events("fetch", "r1")
    assert len(said()) == 1 and lost(meter) == 1
    if kind == "a folder":
        path.rmdir()
    elif kind == "a link to nowhere":
        (tmp_path / "nowhere").mkdir()
    elif kind == "below a file":
        path.parent.unlink()
        path.parent.mkdir()
    else:
        path.parent.mkdir()
    clock.now += 2
    events("fetch", "r2")
    assert [e["request"] for e in read_events([path])] == ["r2"]


def test_a_folder_that_vanishes_and_comes_back(tmp_path, clock, said):
    folder = tmp_path / "logs"
    folder.mkdir()
    events = EventLog(folder / "events", PRODUCER)
    events("fetch", "r1")
    folder.rename(tmp_path / "old")
    clock.now += 2
    events("fetch", "r2")
    assert len(said()) == 1
    folder.mkdir()
    clock.now += 2
    events("fetch", "r3")
    assert [e["request"] for e in read_events([folder / "events"])] == ["r3"]


def test_a_rotated_file_is_followed(tmp_path, clock, said):
    path = tmp_path / "events"
    events = EventLog(path, PRODUCER)
    events("fetch", "r1")
    path.rename(tmp_path / "events.1")
    clock.now += 2
    events("fetch", "r2")
    assert [e["request"] for e in read_events([path])] == ["r2"]
    assert said() == []


def test_a_pipe_without_a_reader_stops_nothing(tmp_path, clock, said):
    """Opening one for writing waits for its reader, unless told not to."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    events = EventLog(path, PRODUCER)
    events("fetch", "r1")
    assert len(said()) == 1
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    clock.now += 2
    events("fetch", "r2")
    assert json.loads(os.read(reader, 1 << 16))["request"] == "r2"
    os.close(reader)
    events("fetch", "r3")
    assert len(said()) == 1


def test_a_pipe_that_nobody_empties_stops_nothing(tmp_path, clock, said, meter):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    events = EventLog(path, PRODUCER, meter)
    for number in range(2000):
        events("fetch", f"r{number}")
    assert len(said()) == 1 and lost(meter) > 0
    data = b""
    while True:
        try:
            data += os.read(reader, 1 << 16)
        except BlockingIOError:
            break
    events("fetch", "last")
    data += os.read(reader, 1 << 16)
    assert json.loads(data.splitlines()[-1])["request"] == "last"
    os.close(reader)


@pytest.mark.parametrize("trouble", [errno.EIO, errno.EDQUOT], ids=errno.errorcode.get)
def test_an_error_of_close_is_a_warning(tmp_path, said, monkeypatch, trouble):
    events = EventLog(tmp_path / "events", PRODUCER)
    events("fetch", "r")
    real = os.close

    def close(fd):
        real(fd)
        raise OSError(trouble, os.strerror(trouble))

    monkeypatch.setattr(events_file.os, "close", close)
    events.close()
    events.close()
    events("fetch", "r")
    assert len(said()) == 1 and os.strerror(trouble) in said()[0]


def test_what_a_crash_left_half_written_does_not_spoil_the_next_line(tmp_path):
    path = tmp_path / "events"
    path.write_text('{"t":1.0,"role":"prod')
    events = EventLog(path, PRODUCER)
    events("fetch", "r1")
    assert json.loads(path.read_text().splitlines()[-1])["request"] == "r1"


def test_both_halves_of_an_instance_warn_once(tmp_path, clock, said):
    producer = EventLog(tmp_path / "absent" / "events", PRODUCER)
    consumer = producer.for_consumer()
    producer("fetch", "r")
    consumer("failed", "r", cause="x", peer="y")
    assert len(said()) == 1
    producer.close()
    consumer.close()


def test_threads_warn_once(tmp_path, said, meter):
    events = EventLog("/dev/full", PRODUCER, meter)

    def work():
        for _ in range(100):
            events("fetch", "r")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(said()) == 1
    assert lost(meter) == 800


@pytest.mark.parametrize("text", ["\ud800", "a\x00b", "line\nbreak", "\x1b[31m", "x" * 100_000])
def test_what_a_client_names_its_request_ends_nothing(tmp_path, text):
    path = tmp_path / "events"
    events = EventLog(path, PRODUCER)
    events("refused", text, text, cause=text)
    (line,) = path.read_text().splitlines()
    assert len(line) < 3000
    assert json.loads(line)["cause"].isprintable()


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mounts a tmpfs")
def test_a_real_full_disk(tmp_path, clock, said, meter):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", tmp_path])
    if mounted.returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        path = tmp_path / "events"
        events = EventLog(path, PRODUCER, meter)
        events("fetch", "before")
        filler = tmp_path / "filler"
        with pytest.raises(OSError, match="No space left"), filler.open("wb", 0) as file:
            while True:
                file.write(bytes(4096))
        for number in range(100):
            events("fetch", f"full{number}")
        assert len(said()) == 1 and lost(meter) > 0
        for way in ("ro", "rw"):
            subprocess.run(["mount", "-o", f"remount,{way}", tmp_path], check=True)
            clock.now += 2
            events("fetch", way)
        filler.unlink()
        clock.now += 2
        events("fetch", "after")
        assert read_events([path])[-1]["request"] == "after"
        events.close()
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


def test_the_file_is_there_from_the_start(tmp_path, caplog):
    path = tmp_path / "events.jsonl"
    events_file.EventsFile(path).close()
    assert path.read_bytes() == b""
    events_file.EventsFile(tmp_path / "no folder" / "events.jsonl").close()
    assert "no folder" in caplog.text
