"""One FedAvg for each group of clients: what is reached by who knows the groups beforehand.

A control, not a method: in a real federation nobody tells the server which clients are alike.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fedmoe.federated.average import average_by_expert
from fedmoe.types import Assignment, Change, ClientInfo, ClientUpdate, MoEState


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
        by_group: dict[str, list[ClientUpdate]] = {name: [] for name in state.models}
        for update in updates:
            by_group[self.groups[update.client]].append(update)
        models = {
            name: average_by_expert(model, _in_turn(by_group[name]))
            for name, model in state.models.items()
        }
        return GroupStates(state.round + 1, models)

    def merged(self, state: GroupStates) -> MoEState | None:
        return None

    def phase(self, state: GroupStates) -> str:
        return "train"

    def changes(self, state: GroupStates) -> Sequence[Change]:
        return ()


def _in_turn(updates: list[ClientUpdate]) -> Iterator[ClientUpdate]:
    while updates:
        yield updates.pop()
