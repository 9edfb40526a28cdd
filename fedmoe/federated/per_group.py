"""One FedAvg for each group of clients: what is reached by who knows the groups beforehand.

A control, not a method: in a real federation nobody tells the server which clients are alike.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fedmoe.federated.average import ByExpert, averaged
from fedmoe.federated.folding import fold
from fedmoe.federated.sums import Sums
from fedmoe.types import Assignment, Change, ClientInfo, ClientUpdate, MoEState, Term, Terms


@dataclass(frozen=True, eq=False)
class GroupStates:
    """A model for each group, by its name."""

    round: int
    models: Mapping[str, MoEState]


@dataclass(frozen=True)
class PerGroup:
    """Clients of a group average among themselves; groups share nothing."""

    groups: Mapping[int, str]  # by client

    def init(self, model: MoEState, clients: Sequence[ClientInfo]) -> GroupStates:
        return GroupStates(0, dict.fromkeys(sorted({self.groups[c.id] for c in clients}), model))

    def assign(
        self, state: GroupStates, clients: Sequence[ClientInfo]
    ) -> Mapping[int, Assignment]:
        models = {c.id: state.models[self.groups[c.id]] for c in clients}
        return {k: Assignment(state.round, m, frozenset(m.experts)) for k, m in models.items()}

    def aggregate(self, state: GroupStates, updates: Iterable[ClientUpdate]) -> GroupStates:
        return fold(self, state, updates)

    def terms(self, state: GroupStates) -> Terms:
        return InGroups(self.groups)

    def settle(
        self, state: GroupStates, sums: Sums, notes: Sequence[ClientUpdate]
    ) -> GroupStates:
        models = {
            name: averaged(model, sums.within(name)) for name, model in state.models.items()
        }
        return GroupStates(state.round + 1, models)

    def merged(self, state: GroupStates) -> MoEState | None:
        return None

    def phase(self, state: GroupStates) -> str:
        return "train"

    def changes(self, state: GroupStates) -> Sequence[Change]:
        return ()


@dataclass(frozen=True)
class InGroups:
    """Terms by expert, for the means of the client's group."""

    groups: Mapping[int, str]

    def __call__(self, update: ClientUpdate) -> Iterator[Term]:
        for key, state, weight in ByExpert()(update):
            yield Term((self.groups[update.client], key), state, weight)
