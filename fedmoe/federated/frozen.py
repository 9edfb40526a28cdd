"""Shared parameters that never change, such as a frozen encoder's: sent to a client once.

`FedAvg` over what is left is how a head on a frozen encoder is learned together: the baseline that
methods with an encoder must beat.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fedmoe.federated.average import ByExpert, WeighShared, averaged, shared_by_examples
from fedmoe.federated.fedavg import FedAvg, ServerState
from fedmoe.federated.sums import Sums
from fedmoe.state import NameTest, nothing
from fedmoe.types import Assignment, ClientInfo, ClientUpdate, MoEState, Terms


def sent_once(assignment: Assignment, frozen: NameTest, has_them: bool) -> Assignment:
    """The assignment, its frozen shared parameters apart for who lacks them, else left out."""
    shared = assignment.model.shared
    once = {} if has_them else {n: t for n, t in shared.items() if frozen(n)}
    rest = {n: t for n, t in shared.items() if not frozen(n)}
    return replace(assignment, model=MoEState(rest, assignment.model.experts), once=once)


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

    def terms(self, state: ServerState) -> Terms:
        return ByExpert(self.weigh, self.weigh_shared)

    def settle(
        self, state: ServerState, sums: Sums, notes: Sequence[ClientUpdate]
    ) -> FrozenState:
        """Who answered has what it was sent."""
        assert isinstance(state, FrozenState)
        have = state.have.union(note.client for note in notes)
        return FrozenState(state.round + 1, averaged(state.model, sums), have)
