"""An experiment is a value: which model, whose data, which strategy, and for how long."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from fedmoe.data.examples import FederatedData
from fedmoe.federated.local import LocalPlan
from fedmoe.federated.rounds import Schedule
from fedmoe.federated.select import memory_for
from fedmoe.types import ClientInfo, MoEState, Strategy


@dataclass(frozen=True, eq=False)
class Experiment:
    """All that a run needs. Derive one by `dataclasses.replace`.

    Attributes:
        name: of the protocol, the same for all methods that are compared.
        method: what this run is called in tables.
        factory: makes the full model with the parameters that everybody starts from; called in
            every process, it must give the same parameters each time.
        clients: what the server knows of the clients of `data`, memory budgets included.
        unseen: clients that never train and are served at the end; their data come from `data` too.
        control: not a method but a mark: it knows what a server cannot know, or ignores limits.
    """

    name: str
    method: str
    factory: Callable[[], nn.Module]
    strategy: Strategy[Any]
    plan: LocalPlan
    data: FederatedData
    clients: tuple[ClientInfo, ...]
    schedule: Schedule
    control: bool = False
    unseen: tuple[ClientInfo, ...] = ()

    def shortened(self, rounds: int) -> "Experiment":
        """The same for another number of rounds."""
        return replace(self, schedule=replace(self.schedule, rounds=rounds))

    def of_first(self, count: int) -> "Experiment":
        """The same for its first `count` clients alone.

        Raises:
            ValueError: it has fewer, or none are left.
        """
        if not 1 <= count <= len(self.clients):
            raise ValueError(
                f"the number of clients must be from 1 to the {len(self.clients)} of {self.name}, "
                f"got {count}"
            )
        return replace(self, clients=self.clients[:count])


def with_budgets(
    data: FederatedData, model: MoEState, shares: Sequence[float]
) -> tuple[ClientInfo, ...]:
    """The data's clients with memory for the shared part and these shares of the experts.

    Shares go round within each group of `data.groups`, so that groups have the same devices.

    Raises:
        ValueError: a share is out of range.
    """
    met: dict[str, int] = {}
    clients = []
    for c in data.clients:
        group = data.groups.get(c.id, "")
        turn = met.get(group, 0)
        met[group] = turn + 1
        clients.append(replace(c, memory_bytes=memory_for(model, shares[turn % len(shares)])))
    return tuple(clients)
