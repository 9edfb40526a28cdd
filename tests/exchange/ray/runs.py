"""What actors run in tests: by module and name, so that their processes find it."""

import os
import signal
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from fedmoe.data.examples import ClientData
from fedmoe.experiments.experiment import Experiment, with_budgets
from fedmoe.experiments.methods import Methods
from fedmoe.federated.fedmoe import FedMoE
from fedmoe.federated.local import LocalMethod, LocalTask, Trained, private_router
from fedmoe.federated.methods.aligned import Aligned
from fedmoe.federated.rounds import Schedule
from fedmoe.state import split_state
from tests.tiny import client_data, experiment, federated_data, tiny

BROKEN, WILD = 5, 6  # a client that fails, and one whose update must be refused


@dataclass(frozen=True)
class Loads:
    """Clients' data; an actor that loads some must die, once for each file `CLIENT-...`."""

    folder: Path
    leader: int = field(default_factory=os.getpid)  # the process that is no actor

    def __call__(self, client: int) -> ClientData:
        for order in sorted(self.folder.glob(f"{client}-*")):
            if os.getpid() != self.leader:
                order.unlink()
                os.kill(os.getpid(), signal.SIGKILL)
        return client_data(client)


class Odd(LocalMethod):
    """Training, with which not all goes well."""

    def train(self, task: LocalTask) -> Trained:
        if task.client == BROKEN:
            raise OSError("the disk is gone")
        trained = super().train(task)
        if task.client == WILD:
            next(task.model.parameters()).detach().fill_(torch.inf)
        return trained


def folded(folder: Path) -> Experiment:
    """FedMoE with kinship, on devices of two sizes."""
    data = replace(federated_data(8), load=Loads(folder))
    base = experiment(data=data)
    return replace(
        base,
        plan=replace(base.plan, method=Odd()),
        method="fedmoe",
        strategy=FedMoE(kinship=1.0, smooth_over=1, patience=1),
        clients=with_budgets(data, split_state(tiny()), (0.25, 0.5)),
        schedule=Schedule(3, seed=5, clients_per_round=7, drop_out=0.1),
    )


def whole(folder: Path) -> Experiment:
    """A strategy that needs all updates at once."""
    return replace(folded(folder), method="aligned", strategy=Aligned(least=0.0))


def personal(build: Experiment) -> Experiment:
    """The same with parameters that stay on clients."""
    return replace(build, plan=private_router(build.plan))


def small(seed: int = 0, rounds: int = 3) -> Methods:
    """For the command line."""
    base = folded(Path("nowhere"))
    return {"fedmoe": replace(base, schedule=Schedule(rounds, seed))}
