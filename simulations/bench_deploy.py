"""Real Flower processes: seconds of a round beside Flower's own FedAvg, and the server's memory.

    python -m simulations.bench_deploy --json [--full]

Seconds: a SuperLink and two clients on loopback, with TLS and keys, started once. Runs take turns
on them: FedAvg of fedmoe, by `flower-client` and its worker, and Flower's FedAvg strategy with a
ClientApp of its own, which builds the same model and data and trains it the same way. Both send
the whole model down and up in every round, in float32, and neither evaluates. A round counts from
its first message to its aggregate; the first of each run is left out, and medians are compared.
The daemons look for work ten times a second for both (Flower's default is once).

Memory: peak resident memory of a process that runs the server's app to its end, with 2 and with 8
clients and a model of 42 MB, with the allocator as `flower-server` sets it. Its grid is in memory,
and the clients answer from another process, one reply at a time as over Flower; so SuperLink and
SuperNodes are not in it.
"""

import argparse
import json
import os
import platform
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from select import select

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from fedmoe.data.examples import Examples
from fedmoe.data.protocols import domains
from fedmoe.deploy.address import Address
from fedmoe.deploy.bundle import write_bundle
from fedmoe.deploy.control import Control
from fedmoe.deploy.deployment import Deployment
from fedmoe.deploy.keys import Keys, make_keys
from fedmoe.deploy.processes import GIVES_MEMORY_BACK, daemon, environment, free_port, stop
from fedmoe.deploy.stopping import terminated_is_stopped
from fedmoe.exchange.flower.client import Client, answer
from fedmoe.exchange.flower.forward import Place
from fedmoe.exchange.flower.post import receive, send
from fedmoe.exchange.flower.records import content_of, post_of
from fedmoe.exchange.flower.server_app import lead
from fedmoe.exchange.flower.settings import Settings
from fedmoe.exchange.flower.worker import serve
from fedmoe.experiments.experiment import Experiment
from fedmoe.federated.fedavg import FedAvg
from fedmoe.federated.local import LocalPlan, Phase, work
from fedmoe.federated.rounds import Schedule
from fedmoe.nn.vision import fashion_cnn
from fedmoe.state import load_state, split_state
from fedmoe.types import Assignment

ROOT = Path(__file__).parents[1]
CLIENTS = 2
FEW, MANY = 2, 8  # clients, for the server's memory
EXPERTS = 4
HEAVY = 2560  # width of an expert there: a model of 42 MB
LONG_S = 600.0

PEER_PROJECT = """\
[project]
name = "peer"
version = "1.0.0"
dependencies = []

[tool.flwr.app]
publisher = "peer"

[tool.flwr.app.components]
serverapp = "peer.server:app"
clientapp = "peer.client:app"

[tool.flwr.app.config]
rounds = {rounds}
out = "{out}"
"""
PEER_SERVER = """\
import json
import time

from flwr.app import ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


class Timed(FedAvg):
    def configure_train(self, server_round, arrays, config, grid):
        self.began = time.perf_counter()
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):
        found = super().aggregate_train(server_round, replies)
        self.seconds.append(time.perf_counter() - self.began)
        return found


@app.main()
def main(grid, context):
    from simulations.bench_deploy import experiment

    model = experiment()["fedavg"].factory()
    strategy = Timed(fraction_evaluate=0.0, min_train_nodes=2, min_available_nodes=2)
    strategy.seconds = []
    arrays = ArrayRecord(model.state_dict())
    strategy.start(grid=grid, initial_arrays=arrays, num_rounds=context.run_config["rounds"])
    with open(context.run_config["out"], "w") as file:
        json.dump(strategy.seconds, file)
"""
PEER_CLIENT = """\
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message, context):
    from simulations.bench_deploy import trained

    return trained(message, context)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--full", action="store_true", help="more turns and rounds")
    parser.add_argument("--memory", type=int, metavar="CLIENTS", help=argparse.SUPPRESS)
    parser.add_argument("--answer", type=int, metavar="CLIENTS", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.answer is not None:
        answer_for(args.answer, args.folder)
    elif args.memory is not None:
        print(json.dumps(peak_bytes_of(args.memory, args.folder)))
    else:
        rows = [*rows_of_memory(), row_of_rounds(*((4, 5) if args.full else (2, 3)))]
        if args.json:
            versions = {p: version(p) for p in ("torch", "flwr")}
            machine = f"{platform.machine()} {platform.system()}, {os.cpu_count()} cores"
            report = {
                "bench": "deploy",
                "machine": machine,
                "versions": {"python": platform.python_version(), **versions},
                "rows": rows,
            }
            print(json.dumps(report))


def experiment(
    seed: int = 0, rounds: int = 4, clients: int = CLIENTS, hidden: int = 128
) -> Mapping[str, Experiment]:
    """FedAvg of the CNN on made-up images: its name is what the processes are given.

    Every token runs every expert, so that every expert is trained and sent back.
    """
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 255, (100 * clients, 28, 28), generator=draw, dtype=torch.uint8)
    labels = torch.arange(len(images)) % 10
    data = domains(
        seed,
        train=60,
        validation=20,
        test=20,
        num_clients=clients,
        source=Examples(images, labels),
    )
    return {
        "fedavg": Experiment(
            "bench",
            "fedavg",
            partial(fashion_cnn, num_experts=EXPERTS, hidden=hidden, k=EXPERTS, seed=seed),
            FedAvg(),
            LocalPlan((Phase(epochs=1),), lr=0.05, batch_size=20),
            data,
            tuple(replace(c, memory_bytes=None) for c in data.clients),
            Schedule(rounds, seed, evaluate_every=rounds + 1),
        )
    }


def trained(message: Message, context: Context) -> Message:
    """What a ClientApp for Flower's FedAvg does: the model from its arrays, training, arrays."""
    torch.set_num_threads(1)
    run = experiment()["fedavg"]
    client = int(context.node_config["client-id"])
    model = run.factory()
    model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    state = split_state(model)
    update, _ = work(
        client,
        Assignment(0, state, frozenset(state.experts)),
        run.factory,
        run.data.load(client),
        run.plan,
        None,
        run.schedule.seed,
    )
    load_state(model, update.model)
    content = RecordDict(
        {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord({"num-examples": update.num_examples}),
        }
    )
    return Message(content, reply_to=message)


def row_of_rounds(turns: int, rounds: int) -> dict[str, object]:
    """Runs in turns on the same daemons."""
    ours: list[float] = []
    theirs: list[float] = []
    with terminated_is_stopped(), ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        control = start_daemons(folder, stack)
        for turn in range(turns):
            ours += our_rounds(control, folder / f"ours-{turn}", rounds)
            theirs += their_rounds(control, folder / f"theirs-{turn}", rounds)
    ours_s, theirs_s = statistics.median(ours), statistics.median(theirs)
    print(f"round, {CLIENTS} clients: {ours_s:.2f} s; Flower's FedAvg {theirs_s:.2f} s")
    return {
        "case": f"round, {CLIENTS} clients on loopback, the whole model both ways",
        "peer": "Flower's FedAvg strategy",
        "ours": round(ours_s, 3),
        "theirs": round(theirs_s, 3),
        "unit": "s",
        "ratio": round(theirs_s / ours_s, 3),
        "share": round(ours_s / theirs_s, 3),
        "all_ours": [round(s, 3) for s in ours],
        "all_theirs": [round(s, 3) for s in theirs],
    }


def start_daemons(folder: Path, stack: ExitStack) -> Control:
    """A SuperLink and two clients, which `stack` ends."""
    make_keys(folder / "keys", ["127.0.0.1"], range(CLIENTS))
    keys, address = Keys(folder / "keys"), Address("127.0.0.1", free_port())
    home = folder / "flower"
    home.mkdir()
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.getenv("PYTHONPATH")]))}
    link = daemon(
        "superlink",
        [
            *("--host", address.host, "--port", str(address.port)),
            *("--ssl-ca-certfile", str(keys.ca), "--ssl-certfile", str(keys.server)),
            *("--ssl-keyfile", str(keys.server_key), "--enable-supernode-auth"),
            *("--database", str(home / "state.db"), "--disable-runtime-dependency-installation"),
        ],
        environment(home, paths),
        home / "superlink.log",
    )
    stack.callback(stop, link, home)
    control = stack.enter_context(Control(address, keys.ca))
    wait_for(control.is_up, "the SuperLink does not answer", link.log)
    control.register(keys.public_keys())
    code = "from fedmoe.deploy.app import client_main; client_main()"
    for number in range(CLIENTS):
        command = [sys.executable, "-c", code, "--server", str(address)]
        command += ["--client-id", str(number), "--keys", str(keys.folder)]
        command += ["--state", str(folder / f"client-{number}")]
        log = folder / f"client-{number}.log"
        with log.open("wb") as file:
            client = subprocess.Popen(
                command, env={**os.environ, **paths}, stdout=file, stderr=file
            )
        stack.callback(client.wait)
        stack.callback(client.terminate)
    wait_for(lambda: control.online() == CLIENTS, "the clients do not come", log)
    return control


def our_rounds(control: Control, folder: Path, rounds: int) -> list[float]:
    """Seconds of the rounds after the first."""
    target = f"{__spec__.name if __spec__ else __name__}:experiment"
    wish = Deployment(target, "fedavg", 0, rounds, CLIENTS, "127.0.0.1", 1, None)
    write_bundle(folder / "bundle", wish.run_config(folder))
    finish(control, folder / "bundle")
    lines = (wish.run_folder(folder) / "rounds.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert not any(r["failed"] or r["refused"] for r in found)
    return [r["seconds"] for r in found if r["phase"] == "train"][1:]


def their_rounds(control: Control, folder: Path, rounds: int) -> list[float]:
    """Seconds of the rounds after the first."""
    package, out = folder / "bundle" / "peer", folder / "seconds.json"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "server.py").write_text(PEER_SERVER)
    (package / "client.py").write_text(PEER_CLIENT)
    project = PEER_PROJECT.format(rounds=rounds, out=out)
    (folder / "bundle" / "pyproject.toml").write_text(project)
    finish(control, folder / "bundle")
    seconds: list[float] = json.loads(out.read_text())
    assert len(seconds) == rounds
    return seconds[1:]


def finish(control: Control, bundle: Path) -> None:
    """Run an app to its end."""
    number = control.submit(bundle)
    wait_for(lambda: control.state(number).status == "finished", "a run does not end", None, 2.0)
    state = control.state(number)
    if state.end != "completed":
        raise RuntimeError(f"the run of {bundle} {state.end}: {state.details}")


def wait_for(
    met: Callable[[], bool], what: str, log: Path | None, every_s: float = 0.2
) -> None:
    end = time.monotonic() + LONG_S
    while not met():
        if time.monotonic() > end:
            said = log.read_text(errors="replace")[-2000:] if log else ""
            raise TimeoutError(f"{what}\n{said}")
        time.sleep(every_s)


def rows_of_memory() -> list[dict[str, object]]:
    """The server's peak memory with few clients (theirs) and with many (ours)."""
    peak = {}
    for clients in (FEW, MANY):
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            command = [sys.executable, "-m", "simulations.bench_deploy", "--folder", folder]
            workers = subprocess.Popen([*command, "--answer", str(clients)], cwd=ROOT)
            try:
                sockets = [place(i, Path(folder)).socket for i in range(clients)]
                wait_for(partial(all_exist, sockets), "the clients do not listen", None)
                run = subprocess.run(
                    [*command, "--memory", str(clients)],
                    cwd=ROOT,
                    env={**os.environ, **GIVES_MEMORY_BACK},
                    check=True,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            finally:
                workers.terminate()
                workers.wait()
            peak[clients] = json.loads(run.stdout.splitlines()[-1])
    ratio = peak[FEW] / peak[MANY]
    print(f"server: {peak[FEW] / 2**20:.0f} MiB with {FEW} clients, {peak[MANY] / 2**20:.0f} with "
          f"{MANY}: {100 * (1 / ratio - 1):+.1f} %")
    return [
        {
            "case": f"server's peak memory, {MANY} clients against {FEW}, model of 42 MB",
            "peer": f"itself with {FEW} clients",
            "ours": peak[MANY],
            "theirs": peak[FEW],
            "unit": "bytes",
            "ratio": round(ratio, 4),
        }
    ]


def all_exist(paths: Iterable[Path]) -> bool:
    return all(path.exists() for path in paths)


def peak_bytes_of(clients: int, folder: Path) -> int:
    """Run the server's app, and tell how much memory this process needed at most."""
    config: dict[str, str | int] = {
        "experiment": "simulations.bench_deploy:experiment",
        "method": "fedavg",
        "rounds": 2,
        "arguments": json.dumps({"clients": clients, "hidden": HEAVY}),
        "folder": str(folder / "run"),
    }
    lead(NearGrid(clients, folder), 1, Settings.of(config))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def place(client: int, folder: Path) -> Place:
    """Where a client of the memory's measurement listens."""
    state, at = folder / f"state-{client}", folder / f"socket-{client}"
    return Place(client, state, at, cache_mb=0, tended=True)


def answer_for(clients: int, folder: Path) -> None:
    """Be as many clients' workers, until ended."""
    threads = []
    lock = threading.Lock()  # one trains at a time
    for number in range(clients):
        there = place(number, folder)
        client = Client.at(there)

        def reply(post, client=client):  # type: ignore[no-untyped-def]
            with lock:
                return answer(post, client)

        thread = threading.Thread(
            target=partial(serve, there.socket, reply, stop=threading.Event()), daemon=True
        )
        thread.start()
        threads.append(thread)
    for thread in threads:
        thread.join()


class NearGrid(Grid):
    """Nodes whose workers have what was pushed, and keep their replies until they are pulled."""

    def __init__(self, clients: int, folder: Path) -> None:
        self.places = {100 + c: place(c, folder) for c in range(clients)}
        self.waiting: dict[str, tuple[Message, socket.socket]] = {}
        self.count = 0
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1

    def set_run(self, run: object) -> None:
        raise NotImplementedError

    @property
    def run(self) -> object:  # type: ignore[override]
        raise NotImplementedError

    def create_message(self, *arguments: object, **named: object) -> Message:
        raise NotImplementedError

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.places)

    def get_nodes(self) -> Sequence[NodeInfo]:
        return [NodeInfo(node_id=n, last_activated_at="now") for n in self.places]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            self.count += 1
            name = f"m{self.count}"
            message.metadata.__dict__["_message_id"] = name
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.connect(os.fspath(self.places[message.metadata.dst_node_id].socket))
            send(connection, post_of(message.content))
            message.content = RecordDict()  # it has left this process
            self.waiting[name] = message, connection
            ids.append(name)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        found = []
        for name in message_ids:
            # As Flower does: nothing is there until the client has begun to send.
            if name in self.waiting and select([self.waiting[name][1]], [], [], 0)[0]:
                message, connection = self.waiting.pop(name)
                with connection, connection.makefile("rb") as stream:
                    post = receive(stream)
                assert post is not None
                found.append(Message(content_of(post), reply_to=message))
        return found


if __name__ == "__main__":
    main()
