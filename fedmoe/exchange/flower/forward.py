"""From the process that Flower starts for a message to the worker that does the work, and back.

Importing torch, the model and the data takes longer than many a client's training. So a worker
stays beside the SuperNode, and what runs for every message only hands it over.
"""

import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import fedmoe
from fedmoe.exchange.flower.post import BROKEN, Post, receive, send

START_S = 300.0  # to import torch on a busy machine
IDLE_S = 1800.0  # after which a worker that nobody looks after ends
POLL_S = 0.05
TAIL = 2000  # characters of a worker's log that an error shows
PATH_LIMIT = 100  # bytes of a socket's path; Unix allows 107


class WorkerError(RuntimeError):
    """The worker cannot be started or does not answer; says why."""


@dataclass(frozen=True)
class Place:
    """A client's place on its machine: who it is, and where its things lie."""

    client: int
    state: Path  # its own parameters, its cache of experts, the worker's log
    socket: Path  # in a folder that is its user's alone
    cache_mb: int = 1024  # 0: no cache
    device: str = "cpu"
    only: str = ""  # the only experiment that it takes part in; empty: any
    tended: bool = False  # somebody else starts its worker, and knows with what state

    @staticmethod
    def of(config: Mapping[str, object]) -> "Place":
        """From a node's configuration: client-id, state, socket, cache-mb, device, experiment.

        With a socket but no state somebody else is taken to look after the worker.

        Raises:
            ValueError: a value is missing or of the wrong kind.
        """
        client = config.get("client-id")
        if not isinstance(client, int) or isinstance(client, bool) or client < 0:
            raise ValueError(
                f"a node's configuration must give its client's number, such as client-id=3, "
                f"got {client!r}"
            )
        cache_mb = config.get("cache-mb", 1024)
        if not isinstance(cache_mb, int) or cache_mb < 0:
            raise ValueError(f"cache-mb must be 0 or more, got {cache_mb!r}")
        state = Path(str(config.get("state") or home() / f"client-{client:06d}")).absolute()
        at = Path(str(config.get("socket") or state / "worker" / "socket")).absolute()
        if len(os.fsencode(at)) > PATH_LIMIT:
            raise ValueError(
                f"socket must be a path of at most {PATH_LIMIT} bytes, got {at}; "
                "choose a shorter one"
            )
        device, only = (str(config.get(name, "")) for name in ("device", "experiment"))
        tended = bool(config.get("socket")) and not config.get("state")
        return Place(client, state, at, cache_mb, device or "cpu", only, tended)


def home() -> Path:
    """Where clients that are told nothing else keep what is theirs; FEDMOE_STATE says otherwise."""
    found = os.environ.get("FEDMOE_STATE")
    if found:
        return Path(found)
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "fedmoe"


def forward(post: Post, place: Place, *, patience_s: float = START_S) -> Post:
    """What the worker answers. One that died over the request answers BROKEN.

    A worker is started where none listens, or waited for where somebody else is to start it.

    Raises:
        WorkerError: there is none after `patience_s` seconds, or it came to nothing.
        PostError: it answers what is no frame.
    """
    gone = "died over its work"
    with _connected(place, patience_s) as connection, connection.makefile("rb") as stream:
        try:
            send(connection, post)
        except OSError as why:  # who refuses a request does not read it to its end
            gone = f"went away: {why}"
        try:
            answer = receive(stream)
        except OSError as why:
            answer, gone = None, f"went away: {why}"
    if answer is None:
        log = "" if place.tended else tail(place.state / "worker.log")
        return Post(BROKEN, f"the worker of client {place.client} {gone}{log}")
    return answer


def _connected(place: Place, patience_s: float) -> socket.socket:
    check_folder(place.socket.parent)
    found = _connect(place.socket)
    if found is not None:
        return found
    # Its end is tied to the process that starts a process for each message.
    process = None if place.tended else start_worker(place, parent=os.getppid(), idle_s=IDLE_S)
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        # Another may have been first, and then ours ends at once.
        found = _connect(place.socket)
        if found is not None:
            return found
        if process is not None and process.poll() not in (None, 0):
            break
        time.sleep(POLL_S)
    if process is None:
        raise WorkerError(f"no worker of client {place.client} listens at {place.socket}")
    stop_worker(process)
    raise WorkerError(
        f"the worker of client {place.client} does not listen at {place.socket}"
        f"{tail(place.state / 'worker.log')}"
    )


def _connect(path: Path) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(os.fspath(path))
    except OSError:  # nobody there, or only the file of one who died
        connection.close()
        return None
    return connection


def check_folder(folder: Path) -> None:
    """Raise WorkerError unless the folder is not there yet, or this user's alone."""
    try:
        found = folder.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise WorkerError(f"{folder} must be a folder of this user's own, for the worker's socket")
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise WorkerError(
            f"{folder} must be open to this user alone (chmod 700), and has mode "
            f"{stat.S_IMODE(found.st_mode):o}"
        )


def start_worker(
    place: Place, *, parent: int | None = None, idle_s: float = 0.0, threads: int = 1
) -> "subprocess.Popen[bytes]":
    """Start a worker in a session of its own; it may take seconds until it listens.

    Args:
        parent: ends when the process of this number is gone; None: the one that calls this.
        idle_s: ends after as many seconds without a request; 0: never.
        threads: that torch may use.
    """
    place.state.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    # The same fedmoe as here, wherever it was found.
    paths = [os.fspath(Path(fedmoe.__file__).parents[1]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
    with (place.state / "worker.log").open("ab") as log:
        return subprocess.Popen(
            worker_command(place, parent=parent or os.getpid(), idle_s=idle_s, threads=threads),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )


def worker_command(
    place: Place, *, parent: int, idle_s: float = 0.0, threads: int = 1
) -> Sequence[str]:
    """What starts a worker."""
    command = [sys.executable, "-m", "fedmoe.exchange.flower.worker"]
    options: dict[str, object] = {
        "--socket": place.socket,
        "--client": place.client,
        "--state": place.state,
        "--cache-mb": place.cache_mb,
        "--device": place.device,
        "--threads": threads,
        "--parent": parent,
        "--idle-s": idle_s,
        "--only": place.only,
    }
    return [*command, *(f"{name}={value}" for name, value in options.items() if value != "")]


def stop_worker(process: "subprocess.Popen[bytes]", patience_s: float = 10.0) -> None:
    """Ask it to end, and kill it if it does not."""
    process.terminate()
    try:
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def tail(path: Path) -> str:
    """The end of a log, for an error's message."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")[-TAIL:].strip()
    except OSError:
        return ""
    return f"; its log {path} ends:\n{text}" if text else ""
