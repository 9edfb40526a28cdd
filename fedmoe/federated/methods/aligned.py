"""Selective averaging: only copies of an expert that went the same way are averaged.

After FedAlign-MoE, arXiv:2603.21276, which averages an expert among semantically consistent
clients; of that paper only the abstract is known here. Ours: two copies agree if their updates,
the differences to the expert as it was sent, have a cosine of at least a threshold. The copy with
which copies of the most tokens agree is the centre, and the server's expert becomes the average
of the centre and of those that agree with it. All others are left out of this expert's round.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fedmoe.federated.average import average_by_expert
from fedmoe.federated.fedavg import FedAvg, ServerState
from fedmoe.federated.sums import Mean
from fedmoe.types import ClientUpdate, ExpertId, MoEState, State


class Copy(NamedTuple):
    """An expert as one client sent it."""

    client: int
    weight: int
    state: State


@dataclass(frozen=True)
class Aligned(FedAvg):
    """FedAvg that averages an expert over the largest group of copies that agree.

    The server holds all copies of a round at once, not one sum as FedAvg does.

    Attributes:
        least: cosine from which on two updates agree, -1 to 1. At -1 all do, which is FedAvg.
    """

    least: float = 0.0

    def __post_init__(self) -> None:
        if not -1 <= self.least <= 1:
            raise ValueError(f"least must be a cosine between -1 and 1, got {self.least}")

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate]) -> ServerState:
        copies: dict[ExpertId, list[Copy]] = {}
        model = average_by_expert(state.model, self._put_aside(updates, copies), self.weigh)
        experts = dict(model.experts)
        for e, its_copies in copies.items():
            mean = Mean()
            for copy in agreeing(state.model.experts[e], its_copies, self.least):
                mean.add(copy.state, copy.weight)
            experts[e] = mean.result(state.model.experts[e])
        return ServerState(state.round + 1, MoEState(model.shared, experts))

    def _put_aside(
        self, updates: Iterable[ClientUpdate], copies: dict[ExpertId, list[Copy]]
    ) -> Iterator[ClientUpdate]:
        """The updates without their experts, which go to `copies`."""
        for update in updates:
            for e, own in update.model.experts.items():
                if weight := self.weigh(update, e):
                    copies.setdefault(e, []).append(Copy(update.client, weight, own))
            yield replace(update, model=MoEState(update.model.shared, {}))


def agreeing(sent: State, copies: Sequence[Copy], least: float) -> list[Copy]:
    """The largest group by weight of a centre and those that agree with it, by client.

    Of two centres with as much weight behind them, the one of the lower client is taken. A copy
    that has not moved has a cosine of 0 with every other.
    """
    ordered = sorted(copies, key=lambda copy: copy.client)
    unit_KN = torch.stack([_direction(sent, copy.state) for copy in ordered])
    # Rounding takes a cosine a little past its limits.
    agree_KK = (unit_KN @ unit_KN.T).clamp(-1, 1) >= least
    agree_KK.fill_diagonal_(True)
    weight_K = torch.tensor([copy.weight for copy in ordered])
    centre = int((agree_KK.long() @ weight_K).argmax())
    return [copy for copy, agrees in zip(ordered, agree_KK[centre], strict=True) if agrees]


def _direction(sent: State, got: State) -> Tensor:
    """Of the update, all parameters in one; length 1, or 0 where nothing moved."""
    names = sorted(n for n in got if got[n].is_floating_point())
    delta_N = torch.cat([(got[n].double() - sent[n].double()).flatten() for n in names])
    unit_N: Tensor = delta_N / delta_N.norm().clamp_min(torch.finfo(torch.float64).tiny)
    return unit_N
