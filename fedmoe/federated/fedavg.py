"""FedAvg, and the strategies that differ from it in who gets which part of the model.

FedAvg: McMahan et al. 2017, arXiv:1602.05629. FedProx (Li et al. 2020, arXiv:1812.06127) is
FedAvg with `LocalPlan(proximal=mu)`; FedPer, FedRep and training alone are FedAvg with personal
parameters; fine-tuning is FedAvg judged after local training.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from fedmoe.federated.average import ByExpert, Weigh, averaged, by_tokens
from fedmoe.federated.folding import fold
from fedmoe.federated.select import experts_that_fit
from fedmoe.federated.sums import Sums
from fedmoe.rng import numpy_generator
from fedmoe.types import (
    Assignment,
    Change,
    ClientInfo,
    ClientUpdate,
    ExpertId,
    MoEState,
    SubMoE,
    Terms,
)


@dataclass(frozen=True, eq=False)
class ServerState:
    """What a server that only averages carries from one round to the next."""

    round: int
    model: MoEState


@dataclass(frozen=True)
class FedAvg:
    """Every client trains the whole model, whatever its memory: the upper bound of capacity.

    Experts are averaged by expert here too; with every client holding every expert this differs
    from plain FedAvg in the weights alone. `weigh=by_examples` is plain FedAvg, but for experts
    that saw none of a client's tokens.
    """

    weigh: Weigh = by_tokens

    def init(self, model: MoEState, clients: Sequence[ClientInfo]) -> ServerState:
        return ServerState(0, model)

    def assign(
        self, state: ServerState, clients: Sequence[ClientInfo]
    ) -> Mapping[int, Assignment]:
        whole = frozenset(state.model.experts)
        return {c.id: Assignment(state.round, state.model, whole) for c in clients}

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate]) -> ServerState:
        return fold(self, state, updates)

    def terms(self, state: ServerState) -> Terms:
        return ByExpert(self.weigh)

    def settle(
        self, state: ServerState, sums: Sums, notes: Sequence[ClientUpdate]
    ) -> ServerState:
        return ServerState(state.round + 1, averaged(state.model, sums))

    def merged(self, state: ServerState) -> MoEState:
        return state.model

    def phase(self, state: ServerState) -> str:
        return "train"

    def changes(self, state: ServerState) -> Sequence[Change]:
        return ()


@dataclass(frozen=True)
class FixedSubMoE(FedAvg):
    """Every client trains the experts that it was given before the first round.

    With `random_choice` it is the control "random sub-MoE"; with `choice_by_group` the upper mark
    of a choice by somebody who knows what kind of data each client has.
    """

    choice: Mapping[int, SubMoE] = field(default_factory=dict)

    def assign(
        self, state: ServerState, clients: Sequence[ClientInfo]
    ) -> Mapping[int, Assignment]:
        """Raises ValueError for a client without a choice."""
        if missing := [c.id for c in clients if c.id not in self.choice]:
            raise ValueError(f"choice must name the experts of every client, client {missing[0]}"
                             f" has none ({len(missing)} in all)")
        return {
            c.id: Assignment(state.round, state.model.only(self.choice[c.id]), self.choice[c.id])
            for c in clients
        }


def random_choice(
    model: MoEState, clients: Sequence[ClientInfo], seed: int
) -> dict[int, SubMoE]:
    """For each client as many experts per layer as its memory holds, drawn without preference.

    Raises:
        ValueError: a client's memory does not hold one expert per layer.
    """
    choice = {}
    for c in clients:
        count = experts_that_fit(model, c.memory_bytes)
        rng = numpy_generator(seed, c.id)
        choice[c.id] = frozenset(
            ExpertId(layer, int(e))
            for layer, numbers in _numbers(model).items()
            for e in rng.choice(numbers, min(count, len(numbers)), replace=False)
        )
    return choice


def choice_by_group(
    model: MoEState, clients: Sequence[ClientInfo], groups: Mapping[int, str]
) -> dict[int, SubMoE]:
    """Divide every layer's experts evenly among the groups; a client gets its group's, then others.

    A client with room for more than its group's share gets the next groups' too; one with less
    room gets the first of its group's, starting at a place of its own, so that none lies idle.

    Raises:
        ValueError: a client's memory does not hold one expert per layer.
    """
    names = sorted(set(groups.values()))
    choice = {}
    for c in clients:
        count = experts_that_fit(model, c.memory_bytes)
        mates = [k.id for k in clients if groups[k.id] == groups[c.id]]
        chosen = set()
        for layer, numbers in _numbers(model).items():
            share = len(numbers) // len(names)
            start = names.index(groups[c.id]) * len(numbers) // len(names)
            shift = mates.index(c.id) * count % share if share > count else 0
            order = numbers[start:] + numbers[:start]
            own = order[:share]
            order = own[shift:] + own[:shift] + order[share:]
            chosen |= {ExpertId(layer, e) for e in order[:count]}
        choice[c.id] = frozenset(chosen)
    return choice


def _numbers(model: MoEState) -> dict[int, list[int]]:
    """The expert numbers of each layer, ascending."""
    layers: dict[int, list[int]] = {}
    for e in sorted(model.experts):
        layers.setdefault(e.layer, []).append(e.expert)
    return layers
