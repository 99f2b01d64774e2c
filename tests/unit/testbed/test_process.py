# SPDX-License-Identifier: Apache-2.0
"""Server processes: readiness, death, and an end without orphans."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from lynx_connector.testbed.cluster import free_port
from lynx_connector.testbed.process import ServerError, ServerProcess

CHILD = r"child:(\d+)"
STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"])
print("child:" + str(child.pid), flush=True)
time.sleep(600)
"""
HEALTHY = """
import http.server, sys
class Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("content-length", "0"); self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def server(tmp_path: Path, code: str, *arguments: str, url: str = "http://127.0.0.1:9"):
    command = [sys.executable, "-c", code, *arguments]
    return ServerProcess("engine", command, url, tmp_path / "logs" / "engine.log", os.environ)


def wait_for(condition, seconds: float = 10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ready_when_it_answers(tmp_path: Path):
    port = free_port()
    engine = server(tmp_path, HEALTHY, str(port), url=f"http://127.0.0.1:{port}")
    engine.start()
    try:
        engine.wait_ready(20)
        engine.check()
        assert engine.running
        with pytest.raises(ServerError, match="runs already"):
            engine.start()
    finally:
        engine.stop()
    assert not engine.running
    assert not engine.healthy()


def test_a_server_that_dies_is_reported_with_its_last_words(tmp_path: Path):
    engine = server(tmp_path, "import sys; print('no such model'); sys.exit(7)")
    engine.start()
    with pytest.raises(ServerError, match=r"(?s)exit status 7.*no such model"):
        engine.wait_ready(20)
    engine.stop()


def test_a_server_that_never_answers_is_reported(tmp_path: Path):
    engine = server(tmp_path, "import time; time.sleep(600)")
    engine.start()
    try:
        with pytest.raises(ServerError, match="not ready after 1 s"):
            engine.wait_ready(1)
    finally:
        engine.stop()


def test_stop_ends_processes_that_ignore_sigterm_and_their_children(tmp_path: Path):
    engine = server(tmp_path, STUBBORN)
    engine.start()
    wait_for(lambda: re.search(CHILD, engine.tail()))
    child = int(re.search(CHILD, engine.tail())[1])
    engine.stop(grace=0.5)
    assert not engine.running
    assert not psutil.pid_exists(child)
    engine.stop()


def test_stop_ends_children_of_a_server_that_died_first(tmp_path: Path):
    code = "import subprocess; p = subprocess.Popen(['sleep', '600']); print('child:' + str(p.pid))"
    engine = server(tmp_path, code)
    engine.start()
    wait_for(lambda: not engine.running)
    child = int(re.search(CHILD, engine.tail())[1])
    assert psutil.pid_exists(child)
    engine.stop()
    wait_for(lambda: not psutil.pid_exists(child) or _is_zombie(child), 5)


def test_a_server_has_its_own_group_but_our_session(tmp_path: Path):
    # Linux schedules every session as a group of its own: NIXL's polling threads then starved the
    # rest of their core for up to 30 s.
    engine = server(tmp_path, "import time; time.sleep(600)")
    engine.start()
    try:
        assert os.getpgid(engine.pid) == engine.pid
        assert os.getsid(engine.pid) == os.getsid(0)
    finally:
        engine.stop()


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv (util-linux)")
@pytest.mark.parametrize("held_still", [False, True])
def test_a_server_goes_with_the_process_that_started_it(tmp_path: Path, held_still):
    """Killed by SIGKILL, it has no chance to stop its servers."""
    starter = """
import os, sys, signal, time
from pathlib import Path
from lynx_connector.testbed.process import ServerProcess
log = Path(sys.argv[1])
command = [sys.executable, "-c", "import time; time.sleep(600)"]
engine = ServerProcess("e", command, "", log, os.environ)
engine.start()
time.sleep(1)
if sys.argv[2] == "True":
    engine.kill(signal.SIGSTOP)
print(engine.pid, flush=True)
time.sleep(600)
"""
    command = [sys.executable, "-c", starter, str(tmp_path / "log"), str(held_still)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        pid = int(process.stdout.readline())
        assert psutil.pid_exists(pid)
        process.kill()
    try:
        wait_for(lambda: not psutil.pid_exists(pid))
    finally:
        if psutil.pid_exists(pid):
            os.kill(pid, signal.SIGKILL)


def test_stop_before_start_does_nothing(tmp_path: Path):
    server(tmp_path, "").stop()


def _is_zombie(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
