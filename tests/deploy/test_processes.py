"""Children end with their parent, and nothing that belongs to a home is overlooked."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedmoe.deploy.address import Address
from fedmoe.deploy.processes import (
    MARK,
    alone,
    belonging,
    check_free,
    end_all,
    environment,
    free_port,
    start,
    stop,
)

LONG_S = 60.0
SLEEP = "import time; time.sleep(600)"
# A daemon that leaves a process in a session of its own, and will not be asked.
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print("started", flush=True)
time.sleep(600)
"""
WATCHED = """
import os, subprocess, sys
code = "from fedmoe.deploy.child import end_with; import sys, time; end_with(int(sys.argv[1]));"
code += "print('ready', flush=True); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", code, str(os.getpid())])
import time; time.sleep(600)
"""


def wait_for(met) -> None:
    end = time.monotonic() + LONG_S
    while not met():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_daemon_s_environment_sends_no_news_and_installs_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    monkeypatch.setenv("no_proxy", "moe.example")
    found = environment(tmp_path, {"FEDMOE_DATA": "/data"})
    assert found["FLWR_HOME"] == found[MARK] == str(tmp_path)
    assert found["FLWR_TELEMETRY_ENABLED"] == "0" and found["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert found["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert found["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert found["no_proxy"].split(",") == ["moe.example", "localhost", "127.0.0.1", "::1"]
    assert found["FEDMOE_DATA"] == "/data"


@pytest.mark.slow
def test_what_belongs_to_a_home_is_ended_whatever_its_session_and_manners(tmp_path):
    env = environment(tmp_path / "home")
    child = start("daemon", [sys.executable, "-c", STUBBORN], env, tmp_path / "log")
    other = subprocess.Popen([sys.executable, "-c", SLEEP], env=environment(tmp_path / "another"))
    try:
        wait_for(lambda: "started" in child.text() and len(belonging(tmp_path / "home")) == 2)
        assert end_all(tmp_path / "home", patience_s=0.2) == 2
        assert child.process.wait() == -signal.SIGKILL
        assert belonging(tmp_path / "home") == [] and other.poll() is None
        stop(child, tmp_path / "home")  # once more does no harm
    finally:
        other.kill()
        other.wait()


@pytest.mark.slow
def test_a_child_ends_when_its_parent_is_killed(tmp_path):
    env = environment(tmp_path) | {"PYTHONPATH": str(Path(__file__).parents[2])}
    parent = start("parent", [sys.executable, "-c", WATCHED], env, tmp_path / "log")
    wait_for(lambda: "ready" in parent.text())
    parent.process.kill()
    parent.process.wait()
    wait_for(lambda: belonging(tmp_path) == [])


def test_a_log_is_added_to_and_each_child_knows_its_own_part(tmp_path):
    log = tmp_path / "logs" / "log"
    for word in ("first", "second"):
        child = start("echo", [sys.executable, "-c", f"print('{word}')"], os.environ, log)
        assert child.process.wait() == child.ended == 0
        assert child.text() == f"{word}\n" and child.tail() == word
    assert log.read_text() == "first\nsecond\n"


def test_a_port_that_is_taken_is_told_before_anything_starts():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = Address("127.0.0.1", server.getsockname()[1])
        with pytest.raises(ValueError, match=rf"{address} cannot be listened on: Address already"):
            check_free(address)
    check_free(Address("127.0.0.1", free_port()))


def test_an_address_of_another_machine_is_told_too():
    with pytest.raises(ValueError, match="cannot be listened on"):
        check_free(Address("192.0.2.1", 8000))


def test_one_folder_is_one_process_s(tmp_path):
    with (
        alone(tmp_path / "a", "flower-server"),
        pytest.raises(ValueError, match="in use by another flower-server"),
        alone(tmp_path / "a", "flower-server"),
    ):
        pass
    with alone(tmp_path / "a", "flower-server"):
        pass
    assert (tmp_path / "a").stat().st_mode & 0o077 == 0
