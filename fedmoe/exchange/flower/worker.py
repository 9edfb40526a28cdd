"""A client's worker: one process that stays, with torch imported and model and data in memory.

It listens on a Unix socket in a folder that is its user's alone, answers one request after
another, and outlives bad ones.

    python -m fedmoe.exchange.flower.worker --socket PATH --client 3 --state FOLDER
"""

import argparse
import fcntl
import os
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType

from fedmoe.exchange.flower.forward import Place, check_folder
from fedmoe.exchange.flower.post import BODY_LIMIT, FAILED, Post, PostError, receive, send

READING_S = 60.0  # without a byte of a request that has begun
POLL_S = 1.0
CREDENTIALS = struct.Struct("3i")  # pid, uid, gid

Answer = Callable[[Post], Post]


def serve(
    at: Path,
    answer: Answer,
    *,
    stop: threading.Event,
    idle_s: float = 0.0,
    limit: int = BODY_LIMIT,
) -> None:
    """Answer requests until `stop` is set, or none came for `idle_s` seconds (0: for ever).

    Args:
        limit: bytes of a request, its head not counted.

    Raises:
        BlockingIOError: another process serves this socket.
        WorkerError: the socket's folder is not this user's alone.
    """
    at.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    check_folder(at.parent)
    with (at.parent / f"{at.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        at.unlink(missing_ok=True)  # of one that died: whoever has the lock is alone
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(os.fspath(at))
            at.chmod(0o600)
            listener.listen(8)
            listener.settimeout(POLL_S)
            asked = time.monotonic()
            while not stop.is_set():
                if idle_s and time.monotonic() - asked > idle_s:
                    break
                try:
                    connection, _ = listener.accept()
                except TimeoutError:
                    continue
                with connection:
                    _attend(connection, answer, limit)
                asked = time.monotonic()
        at.unlink(missing_ok=True)


def _attend(connection: socket.socket, answer: Answer, limit: int) -> None:
    """One request. Whatever is wrong with it, or with who asks, ends it alone."""
    connection.settimeout(READING_S)
    try:
        _check_peer(connection)
        with connection.makefile("rb") as stream:
            request = receive(stream, limit)
        if request is None:
            return
        reply = answer(request)
        del request
        send(connection, reply)
    except PostError as why:
        complain(f"a request was refused: {why}")
        with suppress(OSError):
            send(connection, Post(FAILED, f"PostError: {why}"))
    except OSError as why:
        complain(f"a request came to nothing: {why}")


def _check_peer(connection: socket.socket) -> None:
    if not hasattr(socket, "SO_PEERCRED"):  # not Linux: the folder's mode must do
        return
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
    pid, user, _ = CREDENTIALS.unpack(raw)
    if user != os.getuid():
        raise PostError(f"process {pid} of user {user} has no business here")


def complain(line: str) -> None:
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}", file=sys.stderr, flush=True)


def watch(parent: int, ended: Callable[[], None]) -> None:
    """Call `ended` in a thread once that process is gone."""
    born = birth(parent)

    def look() -> None:
        while birth(parent) == born is not None:
            time.sleep(POLL_S)
        ended()

    threading.Thread(target=look, name="watch", daemon=True).start()


def birth(pid: int) -> str | None:
    """When a process began, which tells it from a later one of the same number; None: it ended."""
    if not Path("/proc/self/stat").exists():
        return _alive(pid)
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]


def _alive(pid: int) -> str | None:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "alive"


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fedmoe.exchange.flower.worker",
        description="A client's worker; the SuperNode's messages are handed to it.",
    )
    parser.add_argument("--socket", type=Path, required=True, help="path of its Unix socket")
    parser.add_argument("--client", type=int, required=True, help="the client's number")
    parser.add_argument("--state", type=Path, required=True, help="folder of what it keeps")
    parser.add_argument("--cache-mb", type=int, default=1024, help="of experts; 0: none")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ...")
    parser.add_argument("--threads", type=int, default=1, help="that torch may use")
    parser.add_argument("--only", default="", help="the only experiment to take part in")
    parser.add_argument("--parent", type=int, help="process with which it ends")
    parser.add_argument("--idle-s", type=float, default=0.0, help="seconds idle until it ends")
    return parser.parse_args(arguments)


def main() -> int:
    options = parsed()
    place = Place(
        options.client,
        options.state.absolute(),
        options.socket.absolute(),
        options.cache_mb,
        options.device,
        options.only,
    )
    stop = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        os._exit(0)  # files are replaced in one step, so whatever is going on may be left off

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    if options.parent is not None:
        watch(options.parent, lambda: os._exit(0))
    # Before torch is loaded: it reads this only then.
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    from fedmoe.exchange.flower.client import Client, answer, ready

    ready(options.threads)
    client = Client.at(place)
    try:
        serve(place.socket, lambda post: answer(post, client), idle_s=options.idle_s, stop=stop)
    except BlockingIOError:
        complain(f"another worker serves {place.socket}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
