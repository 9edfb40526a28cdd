"""What a server was asked to do: said once, kept in its folder, and read again to resume."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from fedmoe.deploy.address import Address
from fedmoe.deploy.bundle import Setting
from fedmoe.deploy.keys import Keys
from fedmoe.exchange.flower.settings import codecs_named
from fedmoe.report.atomic import write_atomically

NAME = "server.json"


@dataclass(frozen=True)
class Deployment:
    """One experiment, served to clients elsewhere.

    Attributes:
        target: of the table of experiments, or module:function; clients must have it too.
        clients: how many of the experiment's clients there are in this run: the first ones, and
            all of them must be there before the first round.
        keys: folder of certificates and keys; None: no TLS, and nobody proves who they are.
        deadline_s: a round goes on without those who have not answered by then; 0: it waits.
        quorum: share of a round's clients, 0 to 1, that must answer for the run to go on.
        codec_down, codec_up: words as `codecs_named` reads them.
        wait_s: for how long the first round waits for the clients; 0: for ever.
    """

    target: str
    method: str
    seed: int
    rounds: int
    clients: int
    host: str
    port: int
    keys: str | None
    deadline_s: float = 0.0
    quorum: float = 0.5
    codec_down: str = "raw"
    codec_up: str = "raw"
    wait_s: float = 0.0

    def __post_init__(self) -> None:
        if self.clients < 1:
            raise ValueError(f"--clients must be at least 1, got {self.clients}")
        if not 0 < self.quorum <= 1:
            raise ValueError(f"--quorum must be above 0 and at most 1, got {self.quorum}")
        for name, value in (("--deadline-s", self.deadline_s), ("--wait-s", self.wait_s)):
            if value < 0:
                raise ValueError(f"{name} must be at least 0 seconds, got {value}")
        for name, words in (("--codec-down", self.codec_down), ("--codec-up", self.codec_up)):
            try:
                codecs_named(words)
            except ValueError as why:
                raise ValueError(f"{name}: {why}") from why
        if "topk" in self.codec_down:
            raise ValueError(
                f"--codec-down cannot be {self.codec_down}: that leaves out most of a model; take "
                f"raw, bf16 or int8"
            )

    @property
    def address(self) -> Address:
        return Address(self.host, self.port)

    @property
    def key_files(self) -> Keys | None:
        return None if self.keys is None else Keys(Path(self.keys))

    def run_folder(self, root: Path) -> Path:
        """Where the run's log and checkpoints are: as `fedmoe run` names it."""
        return root / f"{self.method}-seed{self.seed}"

    def run_config(self, root: Path) -> dict[str, Setting]:
        """What the server's app and the clients are told, through Flower."""
        return {
            "experiment": self.target,
            "method": self.method,
            "seed": self.seed,
            "rounds": self.rounds,
            "folder": str(self.run_folder(root)),
            "clients": self.clients,
            "only-first": self.clients,
            "deadline-s": float(self.deadline_s),
            "quorum": float(self.quorum),
            "codec-down": self.codec_down,
            "codec-up": self.codec_up,
            "wait-s": float(self.wait_s),
        }

    def write(self, root: Path) -> None:
        """Atomically, as server.json."""
        root.mkdir(parents=True, exist_ok=True)
        write_atomically(root / NAME, json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def read(root: Path) -> "Deployment":
        """Raises ValueError where there is none, or it is not one."""
        path = root / NAME
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            known = {f.name for f in fields(Deployment)}
            return Deployment(**{name: v for name, v in found.items() if name in known})
        except FileNotFoundError as why:
            raise ValueError(
                f"{root} holds no server's run: {NAME} is missing; `flower-server --experiment "
                f"NAME --out {root}` begins one"
            ) from why
        except (TypeError, AttributeError, json.JSONDecodeError) as why:
            raise ValueError(f"{path} does not describe a server's run: {why}") from why


def check_security(address: Address, insecure: bool, anywhere: bool) -> None:
    """Raises ValueError: a server without TLS and keys would be open to other machines."""
    if insecure and not address.is_loopback and not anywhere:
        raise ValueError(
            f"--insecure on {address} would let everybody who can reach it read the models and "
            f"pose as a client: make keys with `fedmoe keys`, or listen on --host 127.0.0.1; if "
            f"the network itself is trusted, add --insecure-anywhere"
        )
    if anywhere and not insecure:
        raise ValueError("--insecure-anywhere only says where --insecure may be: give both")
