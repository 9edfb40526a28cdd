"""Daemons as child processes: started with an environment of their own, watched, ended for good.

Flower's daemons start processes of their own, some in sessions of their own. What belongs to a
home is therefore found by a mark in its environment, after a kill too.
"""

import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from fedmoe.deploy.address import Address

MARK = "FEDMOE_CHILD_OF"  # a home, in the environment of every process that belongs to it
# Of glibc: what a server frees, an update at a time, goes back to the system, and is not kept in
# pieces that fit no other.
GIVES_MEMORY_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**17)}
PATIENCE_S = 5.0  # between asking a process to end and ending it
POLL_S = 0.05
TAIL_LINES = 12


def environment(home: Path, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """For daemons whose files lie in `home`: no news to anybody, nothing installed on the way."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    near = ",".join(filter(None, [os.environ.get("no_proxy"), "localhost", "127.0.0.1", "::1"]))
    defaults = {
        "OMP_NUM_THREADS": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",  # seconds that a message waits, at most
    }
    return {
        **defaults,
        **os.environ,
        MARK: str(home),
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONUNBUFFERED": "1",
        "PATH": path,  # where Flower finds the programs of its processes
        "no_proxy": near,
        **(more or {}),
    }


@dataclass(frozen=True)
class Child:
    """A running daemon and where it writes what it has to say."""

    name: str
    process: "subprocess.Popen[bytes]"
    log: Path
    begins: int  # where its own part of the log does

    @property
    def ended(self) -> int | None:
        """Its exit code; None while it runs."""
        return self.process.poll()

    def text(self, since: int = 0) -> str:
        """What it has written, but for as many bytes of its first."""
        with self.log.open("rb") as file:
            file.seek(self.begins + since)
            return file.read().decode(errors="surrogateescape")

    def tail(self) -> str:
        """Its last words."""
        lines = [line for line in self.text().splitlines() if line.strip()]
        return "\n".join(lines[-TAIL_LINES:])


def start(name: str, command: Sequence[str], env: Mapping[str, str], log: Path) -> Child:
    """Start a program; to be called in the main thread, with whose end a daemon would end.

    Its output is appended to `log`. It gets no Ctrl-C from the terminal: whoever started it ends
    it.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        begins = file.tell()
        process = subprocess.Popen(
            list(command),
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Child(name, process, log, begins)


def daemon(name: str, arguments: Sequence[str], env: Mapping[str, str], log: Path) -> Child:
    """Start one of Flower's daemons, superlink or supernode; see `start`."""
    command = [sys.executable, "-m", "fedmoe.deploy.child", str(os.getpid()), name, *arguments]
    return start(name, command, env, log)


def stop(child: Child, home: Path) -> None:
    """End a daemon and whatever else belongs to its home; gently at first."""
    end_all(home, PATIENCE_S)
    child.process.kill()  # it would have been found in its home, had it got that far
    child.process.wait()


def end_all(home: Path, patience_s: float = PATIENCE_S) -> int:
    """End every process that belongs to a home; returns how many there were."""
    found = belonging(home)
    for number in found:
        _signal(number, signal.SIGTERM)
    end = time.monotonic() + patience_s
    while (left := belonging(home)) and time.monotonic() < end:
        time.sleep(POLL_S)
    while left:
        for number in left:
            _signal(number, signal.SIGKILL)
        time.sleep(POLL_S)
        left = belonging(home)
    return len(found)


def belonging(home: Path) -> list[int]:
    """The processes of daemons that were started for `home`, whoever started them."""
    wanted = f"{MARK}={home}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        number = int(folder.name)
        if number == os.getpid():
            continue
        with suppress(OSError):  # it has gone, or is somebody else's
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(number)
    return sorted(found)


def _signal(number: int, which: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.kill(number, which)


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on now."""
    with socket.create_server((host, 0)) as server:
        return int(server.getsockname()[1])


def check_free(address: Address) -> None:
    """Raises ValueError: something listens there already, or the address is not this machine's."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        with socket.create_server((address.host, address.port), family=family):
            return
    except OSError as why:
        raise ValueError(
            f"{address} cannot be listened on: {why.strerror or why}; choose another --port, or "
            f"end what uses it"
        ) from why


@contextmanager
def alone(folder: Path, what: str) -> Iterator[None]:
    """Hold a folder's lock; the system lets go of it when this process ends, however it ends.

    Raises:
        ValueError: another process holds it.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as why:
            raise ValueError(f"{folder} is in use by another {what}: end that first") from why
        yield
