"""An experiment is a value: which model, whose data, which strategy, and for how long."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from fedmoe.data.examples import FederatedData, InTurns
from fedmoe.federated.local import LocalPlan
from fedmoe.federated.rounds import Schedule
from fedmoe.federated.select import memory_for
from fedmoe.population import Population
from fedmoe.types import ClientInfo, MoEState, Strategy
from fedmoe.wire.packing import RAW, Codecs

LISTED = 1000  # clients, at most, of whom a run tells each one by one


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
        down, up: how what goes to clients is coded, and what comes back. Where either has an error,
            clients train on what they decode.
        control: not a method but a mark: it knows what a server cannot know, or ignores limits.
    """

    name: str
    method: str
    factory: Callable[[], nn.Module]
    strategy: Strategy[Any]
    plan: LocalPlan
    data: FederatedData
    clients: Sequence[ClientInfo]
    schedule: Schedule
    control: bool = False
    unseen: Sequence[ClientInfo] = ()
    down: Codecs = RAW
    up: Codecs = RAW

    def __post_init__(self) -> None:
        if self.down.remembers:
            raise ValueError(
                f"down must not leave anything out, which clients would lack, got {self.down}"
            )

    @property
    def coded(self) -> bool:
        """Whether its messages are anything but the numbers as they are."""
        return self.down != RAW or self.up != RAW

    @property
    def listed(self) -> Sequence[ClientInfo]:
        """The clients that are told one by one: all, or of more than LISTED those whom the
        closing evaluation asks.
        """
        if len(self.clients) <= LISTED:
            return self.clients
        return self.schedule.evaluated(self.clients)

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
) -> Sequence[ClientInfo]:
    """The data's clients with memory for the shared part and these shares of the experts.

    Shares go round within each group of `data.groups`, so that groups have the same devices.

    Raises:
        ValueError: a share is out of range.
    """
    sizes = [memory_for(model, share) for share in shares]
    if isinstance(data.clients, Population):
        turn_C = _turns(data, data.clients)
        return data.clients.with_memory(np.array(sizes, np.int64)[turn_C % len(sizes)])
    met: dict[str, int] = {}
    clients = []
    for c in data.clients:
        group = data.groups.get(c.id, "")
        turn = met.get(group, 0)
        met[group] = turn + 1
        clients.append(replace(c, memory_bytes=sizes[turn % len(sizes)]))
    return tuple(clients)


def _turns(data: FederatedData, clients: Population) -> npt.NDArray[np.int64]:
    """For each client how many of its group stand before it."""
    if not data.groups:
        return np.arange(len(clients))
    if isinstance(data.groups, InTurns):
        group_C = data.groups.number_of(clients.ids)
    else:
        number: dict[str, int] = {}
        names = (data.groups.get(c, "") for c in clients.ids.tolist())
        codes = (number.setdefault(name, len(number)) for name in names)
        group_C = np.fromiter(codes, np.int64, len(clients))
    order = np.argsort(group_C, kind="stable")
    first = np.searchsorted(group_C[order], group_C[order])
    turn_C = np.empty(len(clients), np.int64)
    turn_C[order] = np.arange(len(clients)) - first
    return turn_C
