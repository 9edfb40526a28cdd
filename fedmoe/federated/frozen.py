"""Shared parameters that never change, such as a frozen encoder's: sent to a client once.

`FedAvg` over what is left is how a head on a frozen encoder is learned together: the baseline that
methods with an encoder must beat.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from fedmoe.federated.average import WeighShared, average_by_expert, shared_by_examples
from fedmoe.federated.fedavg import FedAvg, ServerState
from fedmoe.state import NameTest, nothing
from fedmoe.types import Assignment, ClientInfo, ClientUpdate, MoEState


def sent_once(assignment: Assignment, frozen: NameTest, has_them: bool) -> Assignment:
    """The assignment, its frozen shared parameters apart for who lacks them, else left out."""
    shared = assignment.model.shared
    once = {} if has_them else {n: t for n, t in shared.items() if frozen(n)}
    rest = {n: t for n, t in shared.items() if not frozen(n)}
    return replace(assignment, model=MoEState(rest, assignment.model.experts), once=once)


def noting(updates: Iterable[ClientUpdate], clients: set[int]) -> Iterator[ClientUpdate]:
    """Pass updates on, and put into `clients` whose they are: these have what they were sent."""
    for update in updates:
        clients.add(update.client)
        yield update


@dataclass(frozen=True, eq=False)
class FrozenState(ServerState):
    """As FedAvg's, and who has the frozen parameters."""

    have: frozenset[int] = frozenset()


@dataclass(frozen=True)
class FedAvgOnFrozen(FedAvg):
    """FedAvg in which parameters that `frozen` names go to each client once, and never back.

    The client's plan must not move them either: `LocalPlan(frozen=...)` of the same names.
    """

    frozen: NameTest = nothing
    weigh_shared: WeighShared = shared_by_examples

    def init(self, model: MoEState, clients: Sequence[ClientInfo]) -> FrozenState:
        return FrozenState(0, model)

    def assign(
        self, state: ServerState, clients: Sequence[ClientInfo]
    ) -> Mapping[int, Assignment]:
        assert isinstance(state, FrozenState)
        given = super().assign(state, clients)
        return {k: sent_once(a, self.frozen, k in state.have) for k, a in given.items()}

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate]) -> FrozenState:
        assert isinstance(state, FrozenState)
        answered: set[int] = set()
        passing = noting(updates, answered)
        model = average_by_expert(state.model, passing, self.weigh, self.weigh_shared)
        return FrozenState(state.round + 1, model, state.have | answered)
