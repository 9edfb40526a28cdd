"""Servers and clients as operators start them: in a folder with an experiment of somebody's own.

A process that is told so by LAB_HOLD stops at a place and leaves a file that says so: there it can
be killed as a power cut would.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fedmoe.deploy.keys import make_keys
from fedmoe.deploy.processes import belonging, end_all, free_port

ROOT = Path(__file__).parents[2]
LONG_S = 240.0  # a busy machine with two slow cores
CLIENTS = 3
ROUNDS = 3

SCRIPT = """\
import sys
from fedmoe.deploy.app import {name}_main
if __name__ == "__main__":
    sys.exit({name}_main())
"""

LAB = '''\
import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

import fedmoe.checkpoint
import fedmoe.exchange.one_client
import fedmoe.experiments.run
from fedmoe.data.examples import Examples
from fedmoe.data.protocols import domains
from fedmoe.experiments.methods import core_methods
from fedmoe.federated.fedmoe import FedMoE
from fedmoe.federated.local import LocalPlan, Phase, private_router
from fedmoe.federated.rounds import Schedule
from fedmoe.nn.vision import fashion_cnn


def tiny(seed: int = 0, rounds: int = 3):
    draw = torch.Generator().manual_seed(5)
    y = torch.randperm(300, generator=draw) % 10
    x = torch.randint(0, 60, (300, 28, 28), generator=draw, dtype=torch.uint8)
    for row, label in zip(x, y.tolist(), strict=True):
        row[2 * label : 2 * label + 4] += 150
    data = domains(seed, train=40, validation=20, test=20, num_clients=3, source=Examples(x, y))
    plan = LocalPlan((Phase(epochs=1),), lr=0.05, batch_size=20, balance=0.01)
    factory = partial(fashion_cnn, num_experts=4, hidden=8, k=2, seed=seed)
    runs = core_methods(
        "tiny", data, factory, plan, Schedule(rounds, seed), (0.5,), FedMoE(seed=seed)
    )
    private = replace(runs["fedmoe"], method="private-router", plan=private_router(plan))
    return {"fedmoe": runs["fedmoe"], "private-router": private, "broken": broken(runs["fedmoe"])}


class Broken(FedMoE):
    def aggregate(self, state, updates):
        raise RuntimeError("the aggregate fell over")


def broken(base):
    return replace(base, method="broken", strategy=Broken(seed=base.strategy.seed))


def hold(place):
    if place == os.environ.get("LAB_HOLD"):
        Path("held").write_text(place)
        while True:
            time.sleep(1)


log = fedmoe.experiments.run.RunLog
create, append = log.create, log.append
write, work = fedmoe.checkpoint._write, fedmoe.exchange.one_client.work


def holding_create(*arguments):
    made = create(*arguments)
    hold("created")
    return made


def holding_append(self, record):
    append(self, record)
    hold(f"log:{record.round}")


def holding_write(path, content):
    name = path.parent.name
    if path.name == "state.json" and "round-" in name:
        number = int(name.split("round-")[1][:6])
        if os.environ.get("LAB_HOLD") == f"checkpoint:{number}":
            write(path, content[: len(content) // 2])
            hold(f"checkpoint:{number}")
    write(path, content)


def holding_work(client, assignment, *arguments):
    update = work(client, assignment, *arguments)
    hold(f"work:{client}:{assignment.round}")
    return update


log.create, log.append = staticmethod(holding_create), holding_append
fedmoe.checkpoint._write = holding_write
fedmoe.exchange.one_client.work = holding_work
'''

# Runs at the start of every process: a SuperNode that is told to stops in the middle of an upload.
SITE = '''\
import os
import sys

if os.environ.get("LAB_HOLD") == "upload" and "supernode" in sys.orig_argv:
    import threading
    import time
    from pathlib import Path

    from flwr.supernode.fleet_http_client import FleetHttpClient

    push, lock, count = FleetHttpClient.PushObject, threading.Lock(), [0]

    def holding_push(self, request):
        with lock:
            count[0] += 1
            # A hello is one object or two; the third and later are of an update.
            if count[0] > 6:
                Path("held").write_text("upload")
                while True:
                    time.sleep(1)
        return push(self, request)

    FleetHttpClient.PushObject = holding_push
'''


def _heed_ctrl_c() -> None:
    # Tests that a shell has put into the background are started deaf to it, and so their children.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@dataclass
class Site:
    """A folder in which servers and clients of one run are started."""

    folder: Path
    port: int = field(default_factory=free_port)
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, program: str, *arguments: str, hold: str = "") -> subprocess.Popen[bytes]:
        """A command in a process of its own; what it says is appended to PROGRAM.log."""
        environment = {**os.environ, "PYTHONPATH": f"{self.folder}:{ROOT}", "LAB_HOLD": hold}
        with (self.folder / f"{program}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, str(self.folder / program), *arguments],
                cwd=self.folder,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_heed_ctrl_c,
            )
        self.started.append(process)
        return process

    def server(self, *arguments: str, hold: str = "") -> subprocess.Popen[bytes]:
        return self.start("flower-server", *arguments, "--log-json", hold=hold)

    def begin(self, method: str, *more: str, hold: str = "") -> subprocess.Popen[bytes]:
        """A server of the experiment, into served/."""
        chosen = ("--experiment", "lab:tiny", "--method", method, "--rounds", str(ROUNDS))
        place = ("--out", "served", "--host", "127.0.0.1", "--port", str(self.port))
        return self.server(*chosen, *place, *more, hold=hold)

    def resume(self, *more: str, hold: str = "") -> subprocess.Popen[bytes]:
        """A server that goes on with what lies in served/."""
        return self.server("--resume", "served", *more, hold=hold)

    def client(self, number: int, *more: str, hold: str = "") -> subprocess.Popen[bytes]:
        return self.start(
            "flower-client",
            *("--server", f"127.0.0.1:{self.port}", "--client-id", str(number), *more),
            "--log-json",
            hold=hold,
        )

    def said(self, program: str = "flower-server") -> str:
        path = self.folder / f"{program}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def rounds(self, method: str) -> list[dict[str, Any]]:
        path = self.folder / "served" / f"{method}-seed0" / "rounds.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]

    def wait(self, met: Callable[[], object], what: str) -> None:
        end = time.monotonic() + LONG_S
        while not met():
            assert time.monotonic() < end, f"{what}\n{self.said()}\n{self.said('flower-client')}"
            time.sleep(0.1)

    def ended(self, process: subprocess.Popen[bytes]) -> int:
        """A process's exit code, once it has one."""
        self.wait(lambda: process.poll() is not None, f"{process.args} goes on")
        return process.returncode

    def kill_held(self, process: subprocess.Popen[bytes], place: str) -> None:
        """Kill a command, and it alone, once one of its processes stands at `place`."""
        held = self.folder / "held"

        def there() -> bool:
            assert process.poll() is None, f"it ended before {place}: {self.said()}"
            return held.exists() and held.read_text() == place

        self.wait(there, f"nobody comes to {place}")
        process.kill()
        process.wait()
        held.unlink()

    def homes(self) -> Sequence[Path]:
        return [p.parent for p in self.folder.glob("**/flower/source")]

    def left(self) -> list[int]:
        """Processes of any daemon that was started here."""
        return [n for home in self.homes() for n in belonging(home)]

    def clear(self) -> None:
        for process in self.started:
            if process.poll() is None:
                process.kill()
                process.wait()
        for home in self.homes():
            end_all(home, patience_s=0.5)


@pytest.fixture
def site(tmp_path):
    """A folder with keys for three clients; nothing that was started in it is left running."""
    (tmp_path / "lab.py").write_text(LAB)
    (tmp_path / "sitecustomize.py").write_text(SITE)
    for name in ("server", "client"):
        (tmp_path / f"flower-{name}").write_text(SCRIPT.format(name=name))
    make_keys(tmp_path / "keys", ["127.0.0.1"], range(CLIENTS))
    found = Site(tmp_path)
    try:
        yield found
    finally:
        found.clear()


def in_process(folder: Path, method: str) -> list[dict[str, Any]]:
    """The rounds of the same run in one process."""
    (folder / "lab.py").write_text(LAB)
    code = "import sys; from fedmoe.cli import main; sys.argv[0] = 'fedmoe'; main()"
    arguments = ("run", "lab:tiny", "--method", method, "--rounds", str(ROUNDS))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments, "--out", "runs", "--no-report"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    path = folder / "runs" / f"{method}-seed0" / "rounds.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]
