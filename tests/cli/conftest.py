"""A folder with an experiment of somebody's own, and ways to call the command in it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from fedmoe.checkpoint import save_checkpoint
from fedmoe.cli.app import app
from fedmoe.federated.fedavg import ServerState
from fedmoe.report.log import ClientAccuracy, ClientEntry, RoundRecord, RunInfo, RunLog
from fedmoe.types import ExpertId, MoEState

ROOT = Path(__file__).parents[2]
START_S = 60.0  # a busy machine may take long to load torch

SCRIPT = """\
import sys
from fedmoe.cli import main
if __name__ == "__main__":
    sys.exit(main())
"""

# Small enough for a second: 4 clients, 4 experts, made-up images of which a row tells the class.
LAB = '''\
import os
import signal
import signal
from dataclasses import replace
from functools import partial

import torch

import fedmoe.checkpoint
import fedmoe.federated.cohort
import fedmoe.experiments.run
from fedmoe.data.examples import Examples
from fedmoe.data.protocols import domains
from fedmoe.experiments.methods import core_methods
from fedmoe.federated.fedmoe import FedMoE
from fedmoe.federated.local import LocalPlan, Phase, private_router
from fedmoe.federated.rounds import Schedule
from fedmoe.nn.vision import fashion_cnn

print("the lab talks on stdout")


def tiny(seed: int = 0, rounds: int = 2, share: float = 0.5, k: int = 2, lr: float = 0.05):
    draw = torch.Generator().manual_seed(int(os.environ.get("LAB_DATA", "5")))
    y = torch.randperm(400, generator=draw) % 10
    x = torch.randint(0, 60, (400, 28, 28), generator=draw, dtype=torch.uint8)
    for row, label in zip(x, y.tolist(), strict=True):
        row[2 * label : 2 * label + 4] += 150
    data = domains(seed, train=40, validation=20, test=20, num_clients=4, source=Examples(x, y))
    plan = LocalPlan((Phase(epochs=1),), lr=lr, batch_size=20, balance=0.01)
    factory = partial(fashion_cnn, num_experts=4, hidden=8, k=k, seed=seed)
    runs = core_methods(
        "tiny", data, factory, plan, Schedule(rounds, seed), (share,), FedMoE(seed=seed)
    )
    base = runs["fedmoe"]
    private = replace(base, method="private-router", plan=private_router(plan))
    return runs | {"private-router": private}


def poor(seed: int = 0, rounds: int = 2):
    runs = tiny(seed, rounds)
    return {
        m: replace(e, clients=tuple(replace(c, memory_bytes=1000) for c in e.clients))
        for m, e in runs.items()
    }


def narrow(seed: int = 0, rounds: int = 2):
    return tiny(seed, rounds, k=9)


def diverging(seed: int = 0, rounds: int = 2):
    return tiny(seed, rounds, lr=1e30)


def half_broken(seed: int = 0, rounds: int = 2):
    runs = tiny(seed, rounds)
    broken = replace(runs["local"], factory=runs["local"].factory, strategy=Broken())
    return {"fedavg": runs["fedavg"], "broken": replace(broken, method="broken")}


class Broken(type(tiny()["fedavg"].strategy)):
    def aggregate(self, state, updates):
        raise RuntimeError("the aggregate fell over")


def as_list(seed: int = 0, rounds: int = 2):
    return list(tiny(seed, rounds))


def misnamed(seed: int = 0, rounds: int = 2):
    return {"mine": tiny(seed, rounds)["fedavg"]}


def stubborn(seed: int = 0, rounds: int = 2):
    return tiny(seed, 7)


def faulty(seed: int = 0, rounds: int = 2):
    return {}[seed]


def without_rounds(seed: int = 0):
    return tiny(seed)


# Die, with the process that started this one, at LAB_KILL=PLACE:ROUND, as a power cut would.

def die():
    os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


place, _, number = os.environ.get("LAB_KILL", "").partition(":")
at = int(number or -1)
log = fedmoe.experiments.run.RunLog
create, append = log.create, log.append
write, working = fedmoe.checkpoint._write, fedmoe.federated.cohort.working


def dying_create(*arguments):
    if place == "start":
        die()
    made = create(*arguments)
    if place == "created":
        die()
    return made


def dying_append(self, record):
    append(self, record)
    if record.round == at and place == "torn":
        text = self.path.read_bytes()
        self.path.write_bytes(text[: -len(text.splitlines()[-1]) // 2])
    if record.round == at and place in ("log", "torn"):
        die()


def dying_write(path, content):
    if place == "checkpoint" and path.name == "state.json" and f".round-{at:06d}." in str(path):
        write(path, content[: len(content) // 2])
        die()
    write(path, content)


def dying_work(client, assignment, *arguments):
    if place == "work" and assignment.round == at and client == 2:
        die()
    return working(client, assignment, *arguments)


log.create, log.append = staticmethod(dying_create), dying_append
fedmoe.checkpoint._write, fedmoe.federated.cohort.working = dying_write, dying_work
'''


def _heed_ctrl_c() -> None:
    # Tests that a shell has put into the background are started deaf to it, and so their children.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@dataclass(frozen=True)
class Lab:
    """A folder with `lab.py`, and a console script that pip might have written."""

    folder: Path

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        """The command in a process of its own."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
        return subprocess.Popen(
            [sys.executable, str(self.folder / "fedmoe"), *arguments],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # so that a test's Ctrl-C is its own
            preexec_fn=_heed_ctrl_c,
        )

    def call(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments, **variables)
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def lines(self, run: str) -> list[dict[str, Any]]:
        """The rounds that a run has logged, but for how long they took."""
        path = self.folder / run / "rounds.jsonl"
        found = [json.loads(line) for line in path.read_text().splitlines()]
        return [{k: v for k, v in line.items() if k != "seconds"} for line in found]

    def wait_for_lines(self, run: str, count: int) -> None:
        path = self.folder / run / "rounds.jsonl"
        end = time.monotonic() + START_S
        while not path.exists() or path.read_bytes().count(b"\n") < count:
            assert time.monotonic() < end, f"{run} has not logged {count} rounds"
            time.sleep(0.02)


def make_lab(folder: Path) -> Lab:
    (folder / "lab.py").write_text(LAB)
    (folder / "fedmoe").write_text(SCRIPT)
    return Lab(folder)


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return make_lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture
def inside(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder as current directory, from which `lab:tiny` can be named."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(lab.folder)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    return tmp_path


Call = Callable[..., Result]


@pytest.fixture
def fedmoe() -> Call:
    """The command within this process."""

    def call(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(a) for a in arguments])

    return call


def small_model(seed: int = 0, num_experts: int = 3) -> MoEState:
    draw = torch.Generator().manual_seed(seed)
    experts = {
        ExpertId(0, e): {"up.weight": torch.randn(2, 4, generator=draw)}
        for e in range(num_experts)
    }
    return MoEState({"stem.weight": torch.randn(5, generator=draw)}, experts)


def write_run(
    root: Path,
    method: str = "fedmoe",
    seed: int = 0,
    rounds: int = 2,
    *,
    accuracy: float = 0.5,
    partition: str | None = None,
    finished: bool = True,
    experiment: str = "tiny",
) -> Path:
    """A made-up run of two clients that hold experts {0, 1} and {1}, with its checkpoints."""
    folder = root / f"{method}-seed{seed}"
    info = RunInfo(
        experiment=experiment,
        method=method,
        seed=seed,
        rounds=rounds,
        num_experts_L=(3,),
        num_classes=10,
        partition_hash=partition or f"part{seed}",
        versions={"fedmoe": "0.1.0"},
        machine={"cores": 2},
        model_parameters=29,
        full_bytes=500,
        clients=tuple(ClientEntry(i, None, None, 100, 100, 100) for i in range(2)),
    )
    log = RunLog.create(folder, info)
    held: Mapping[int, Sequence[Sequence[int]]] = {0: [[0, 1]], 1: [[1]]}
    for round in range(rounds + finished):
        final = round == rounds
        state = ServerState(round + 1, small_model(seed=round))
        digest = ""
        if not final:
            digest = save_checkpoint(folder / "checkpoints", round + 1, state)
        log.append(
            RoundRecord(
                round=round,
                phase="final" if final else "train",
                seconds=1.0,
                bytes_down=1000,
                bytes_up=0 if final else 1000,
                clients=[0, 1],
                held=held,
                count={} if final else {0: [[10, 5, 0]], 1: [[0, 7, 0]]},
                accuracy={c: ClientAccuracy(accuracy, accuracy) for c in (0, 1)},
                model_hash=digest,
            )
        )
    return folder
