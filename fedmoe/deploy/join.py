"""flower-client: a SuperNode and the worker beside it, kept alive until somebody ends them.

Flower starts a process for every message; the worker stays, with torch, the data and the personal
parameters in it, and those processes only carry. All that a client keeps lies in one folder:
`flower/` (the SuperNode's home) and `worker/` (personal parameters, and experts by their content).
"""

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import ssl
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from fedmoe.cli.trouble import FAILED, INTERRUPTED, CommandError
from fedmoe.cli.words import duration
from fedmoe.deploy.address import Address
from fedmoe.deploy.child import LAST
from fedmoe.deploy.keys import Keys, check_private_key
from fedmoe.deploy.processes import (
    Child,
    alone,
    daemon,
    end_all,
    environment,
    free_port,
    start,
)
from fedmoe.deploy.stopping import TerminatedError, terminated_is_stopped
from fedmoe.deploy.voice import Fact, Voice
from fedmoe.exchange.flower.forward import PATH_LIMIT, Place, check_folder, worker_command

NODE = "node"  # a file of the state: which node it was when it was last in
LOOK_S = 0.5
LEAST_DELAY_S, MOST_DELAY_S = 1.0, 60.0  # before a daemon that has ended is started again
STEADY_S = 60.0  # one that lived this long was well
REACH_S = 10.0
CONNECTED = re.compile(r"SuperNode ID: (\d+)")
ANSWERED = "Sent successfully"
REFUSED = re.compile(r"Failed to initialize the connection to the SuperLink\.\s*(.+)")
FOLDERS = {  # of data, by the variable that names them
    "FEDMOE_FASHION_MNIST": "fashion-mnist",
    "FEDMOE_MNIST": "mnist",
    "FEDMOE_HAPT": "hapt",
}


@dataclass(frozen=True)
class Membership:
    """Who a client is, and what it lets a server use.

    Attributes:
        ca: the authority that signed the server's certificate; None: without TLS.
        key: what the client proves itself by; None: it does not.
        data: folder that its data lie in; None: where they usually lie.
        only: the one experiment that it takes part in; None: whichever the server has.
        give_up_s: for how long it tries to get in, before it ends; None: for ever.
    """

    server: Address
    client: int
    state: Path
    ca: Path | None = None
    key: Path | None = None
    data: Path | None = None
    cache_mb: int = 1024
    device: str | None = None
    only: str | None = None
    give_up_s: float | None = None

    def __post_init__(self) -> None:
        if self.client < 0:
            raise ValueError(f"--client-id must be a number from 0, got {self.client}")
        if self.cache_mb < 0:
            raise ValueError(f"--cache-mb must be at least 0 MiB, got {self.cache_mb}")
        if self.data is not None and not self.data.is_dir():
            raise ValueError(f"--data must be a folder, got {self.data}")


def find_key(keys: Path, client: int) -> Path:
    """A client's key in a folder of keys, as `fedmoe keys` leaves it, or as it was brought here."""
    usual = Keys(keys).client(client)
    brought = keys / usual.name
    return brought if brought.is_file() and not usual.is_file() else usual


def join_command(membership: Membership, voice: Voice) -> None:
    """Take part until stopped. Raises CommandError: it was, or it gave up."""
    if membership.ca is not None:
        if not membership.ca.is_file():
            raise FileNotFoundError(
                f"{membership.ca} is missing: bring ca.crt here from where keys are made"
            )
        if membership.key is None:
            raise ValueError("a client proves itself by its key: name it with --key or --keys")
        check_private_key(membership.key)
    state = membership.state.absolute()
    with alone(state, "flower-client"):
        try:
            with terminated_is_stopped(), ExitStack() as stack:
                Client(membership, state, voice, stack).run()
        except (KeyboardInterrupt, TerminatedError) as why:
            code = INTERRUPTED if isinstance(why, KeyboardInterrupt) else 128 + signal.SIGTERM
            raise CommandError("stopped; what the client keeps is kept", code) from why


@dataclass
class Kept:
    """A daemon that is started again whenever it ends."""

    name: str
    begin: Callable[[], Child]
    may_begin: Callable[["Kept"], bool]
    child: Child | None = None
    began: float = 0.0
    delay_s: float = LEAST_DELAY_S
    again_at: float = 0.0
    read: int = 0  # bytes of its log that were looked at


class Client:
    """One client's two daemons, from start to end."""

    def __init__(
        self, membership: Membership, state: Path, voice: Voice, stack: ExitStack
    ) -> None:
        """`stack` ends what the client has started."""
        self.m, self.state, self.voice, self.stack = membership, state, voice, stack
        self.home = state / "flower"
        self.place = place_of(membership, state)
        self.worker = Kept("worker", self._begin_worker, lambda kept: True)
        self.node = Kept("SuperNode", self._begin_node, self._server_is_there)
        self.tried_since = time.monotonic()
        self.answers = 0

    def run(self) -> None:
        """Raises CommandError: the server is not who it should be, or lets nobody in for long."""
        m = self.m
        if left := end_all(self.home):
            self.voice.say("cleared", f"ended what a killed client left: {left} of its processes")
        facts: dict[str, Fact] = {"client": m.client, "server": str(m.server)}
        self.voice.say("start", f"client {m.client} joins {m.server}; keeps {self.state}", facts)
        if m.ca is None:
            self.voice.say(
                "insecure", "no TLS, and neither side proves who it is", level="warning"
            )
        if self.place.socket.parent != self.place.state:
            self.stack.callback(shutil.rmtree, self.place.socket.parent, ignore_errors=True)
        self.stack.callback(end_all, self.home)
        while True:
            now = time.monotonic()
            for kept in (self.worker, self.node):
                if kept.child is not None and kept.child.ended is not None:
                    self._ended(kept, now)
                if kept.child is None and now >= kept.again_at and kept.may_begin(kept):
                    kept.child, kept.began, kept.read = kept.begin(), now, 0
            self._listen()
            time.sleep(LOOK_S)

    def _server_is_there(self, kept: Kept) -> bool:
        """A SuperNode starts once its worker listens and its server is there, and the right one."""
        if not listens(self.place.socket):
            return False
        try:
            reach(self.m.server, self.m.ca)
        except ssl.SSLError as why:
            raise CommandError(
                f"{self.m.server} is not the server that {self.m.ca} vouches for, or is no server "
                f"with TLS: {reason_of(why)}",
                FAILED,
            ) from why
        except OSError as why:
            self._problem(kept, f"{self.m.server} is not there: {why.strerror or why}")
            return False
        return True

    def _ended(self, kept: Kept, now: float) -> None:
        child = kept.child
        assert child is not None
        self._listen()
        if now - kept.began >= STEADY_S:
            kept.delay_s = LEAST_DELAY_S
        refused = REFUSED.search(child.text())
        if refused:
            text = f"{self.m.server} does not let client {self.m.client} in: {refused.group(1)} "
            text += f"Either it does not know the public key of {self.m.key}, or somebody is in "
            text += "with that key, or was until a minute ago"
        else:
            text = f"the {kept.name} ended (exit code {child.ended}); the end of {child.log}:\n"
            text += child.tail()
        kept.child = None
        self._problem(kept, text)

    def _problem(self, kept: Kept, text: str) -> None:
        """Tell of what keeps a daemon from its work, and when it is tried again."""
        waited = time.monotonic() - self.tried_since
        if self.m.give_up_s is not None and waited >= self.m.give_up_s:
            raise CommandError(f"gave up after {duration(waited)}: {text}", FAILED)
        kept.again_at = time.monotonic() + kept.delay_s
        text += f"; tries again in {duration(kept.delay_s)}"
        self.voice.say("trouble", text, {"delay_s": kept.delay_s}, level="warning")
        kept.delay_s = min(2 * kept.delay_s, MOST_DELAY_S)

    def _listen(self) -> None:
        """Tell what the SuperNode's log says of how it fares."""
        node = self.node
        if node.child is None:
            return
        new = node.child.text(node.read)
        new = new[: new.rfind("\n") + 1]
        node.read += len(new.encode(errors="surrogateescape"))
        if found := CONNECTED.search(new):
            number = found.group(1)
            (self.state / NODE).write_text(number, encoding="ascii")
            self.voice.say("connected", f"is in, as node {number}", {"node": number})
            self.tried_since, node.delay_s = float("inf"), LEAST_DELAY_S
        if count := new.count(ANSWERED):
            self.answers += count
            text = f"has answered {self.answers} messages"
            self.voice.say("answered", text, {"answers": self.answers})

    def _begin_worker(self) -> Child:
        command = worker_command(self.place, parent=os.getpid())
        env = environment(self.home, data_variables(self.m.data))
        return start("worker", command, env, self.place.state / "worker.log")

    def _begin_node(self) -> Child:
        m = self.m
        arguments = ["--superlink", str(m.server), "--host", "127.0.0.1"]
        arguments += ["--port", str(free_port())]
        arguments += ["--node-config", node_config(self.place)]
        if m.ca is None:
            arguments += ["--insecure"]
        else:
            arguments += ["--root-certificates", str(m.ca.resolve())]
            arguments += ["--auth-supernode-private-key", str(Path(m.key or "").resolve())]
        env = environment(self.home, data_variables(m.data))
        if (self.state / NODE).exists():
            env[LAST] = (self.state / NODE).read_text(encoding="ascii").strip()
        return daemon("supernode", arguments, env, self.home / "supernode.log")


def node_config(place: Place) -> str:
    """What the processes that a SuperNode starts must know of the worker, as Flower reads it."""
    return f"client-id={place.client} socket={json.dumps(str(place.socket))}"


def listens(path: Path) -> bool:
    """Whether somebody answers at a Unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.connect(os.fspath(path))
        except OSError:
            return False
    return True


def reach(server: Address, ca: Path | None) -> None:
    """Shake hands with a server.

    Raises:
        ssl.SSLError: it is not the one that `ca` vouches for.
        OSError: it is not there.
    """
    with socket.create_connection((server.host, server.port), REACH_S) as plain:
        if ca is None:
            return
        context = ssl.create_default_context(cafile=str(ca))
        with context.wrap_socket(plain, server_hostname=server.host):
            return


def reason_of(why: ssl.SSLError) -> str:
    """What OpenSSL found wrong, without its own codes."""
    return getattr(why, "verify_message", "") or why.reason or str(why)


def place_of(m: Membership, state: Path) -> Place:
    """Where the worker's things lie. A socket's path must be short: it may be in another folder."""
    folder = state / "worker"
    at = folder / "socket"
    if len(os.fsencode(at)) > PATH_LIMIT:
        digest = hashlib.sha256(os.fsencode(state)).hexdigest()[:16]
        at = Path(tempfile.gettempdir()) / f"fedmoe-{os.getuid()}-{digest}" / "socket"
    for private in (folder, at.parent):
        private.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_folder(private)
    return Place(m.client, folder, at, m.cache_mb, m.device or "cpu", m.only or "")


def data_variables(data: Path | None) -> Mapping[str, str]:
    """The environment by which data sets are found in a folder, or in one of its own."""
    if data is None:
        return {}
    folder = data.resolve()
    found = {"FEDMOE_DATA": str(folder)}
    for variable, name in FOLDERS.items():
        if (folder / name).is_dir():
            found[variable] = str(folder / name)
    return found
