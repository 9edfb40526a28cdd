"""Averaging what clients send back: the arithmetic of aggregation, without policy.

Sums of floating-point numbers depend on their order, and updates arrive in any order. So terms
are put on a grid of whole multiples of 2**-GRID_BITS and added as 64-bit integers: the sum is the
same bit for bit whatever the order, in one process or in many. A mean is off by at most
2**-(GRID_BITS + 1) over the mean weight: 1e-11 for clients of 200 examples.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedmoe.types import ActivationProfile, ClientUpdate, ExpertId, MoEState, State

GRID_BITS = 28
LIMIT = 2.0 ** (62 - GRID_BITS)  # of a sum of weight times |value|
UPDATE_LIMIT = LIMIT / 1024  # of one update, so that a thousand of the largest can be summed


@dataclass
class Mean:
    """A weighted mean of states that is folded as they come; memory of one state, not of all.

    A mean of one state is that state, bit for bit.
    """

    weight: int = 0
    _first: State | None = None
    _sums: dict[str, Tensor] = field(default_factory=dict)
    _reach: dict[str, float] = field(default_factory=dict)  # bound of |sum| so far

    def add(self, state: State, weight: int) -> None:
        """Fold `state` in.

        Raises:
            ValueError: weight below 1, or a value so large that the sum could overflow. Nothing
                of the state is folded then.
        """
        if weight < 1:
            raise ValueError(f"weight must be at least 1, got {weight}")
        reach = {n: self._reach.get(n, 0.0) + weight * _largest(t) for n, t in state.items()}
        for name, bound in reach.items():
            if not bound < LIMIT:
                raise ValueError(
                    f"parameter {name!r}: weight times value must stay below {LIMIT:.0f} in "
                    f"sum, got {bound:.3g}"
                )
        if self.weight == 0:
            self._first = state
        else:
            if self._first is not None:
                self._fold(self._first, self.weight)
                self._first = None
            self._fold(state, weight)
        self.weight += weight
        self._reach = reach

    def _fold(self, state: State, weight: int) -> None:
        for name, value in state.items():
            term = value.detach().to(torch.float64).mul_(weight * 2.0**GRID_BITS).round_().long()
            if name in self._sums:
                self._sums[name].add_(term)
            else:
                self._sums[name] = term

    def result(self, old: State) -> dict[str, Tensor]:
        """The mean, in the dtypes of `old`; names that were never sent keep `old`'s values."""
        if self.weight == 0:
            return dict(old)
        if self._first is not None:
            return {**old, **self._first}
        mean = {}
        for name, total in self._sums.items():
            value = total.double() / self.weight / 2.0**GRID_BITS
            whole = not old[name].dtype.is_floating_point
            mean[name] = (value.round() if whole else value).to(old[name].dtype)
        return {**old, **mean}


Weigh = Callable[[ClientUpdate, ExpertId], int]


def by_tokens(update: ClientUpdate, expert: ExpertId) -> int:
    """Tokens that the client sent this expert while training."""
    return tokens_of(update.profile, expert)


def by_examples(update: ClientUpdate, expert: ExpertId) -> int:
    """The client's examples, whatever the expert saw of them, but 0 if it saw none."""
    return update.num_examples if tokens_of(update.profile, expert) else 0


def average_by_expert(
    model: MoEState, updates: Iterable[ClientUpdate], weigh: Weigh = by_tokens
) -> MoEState:
    """Average each expert over the clients that held it, and the rest over all clients.

    An expert, and its gate row with it, weighs what `weigh` says; shared parameters weigh by the
    client's examples. An expert with one holder is copied bit for bit; one that nobody used keeps
    the parameters it has in `model`. (FedMoE, Mei et al. 2024, arXiv:2408.11304, modular
    aggregation; weights by tokens are ours.)
    """
    shared, experts = Mean(), {e: Mean() for e in model.experts}
    for update in updates:
        if update.model.shared:
            shared.add(update.model.shared, update.num_examples)
        for e, state in update.model.experts.items():
            if weight := weigh(update, e):
                experts[e].add(state, weight)
    return MoEState(
        shared.result(model.shared),
        {e: experts[e].result(state) for e, state in model.experts.items()},
    )


def tokens_of(profile: ActivationProfile, expert: ExpertId) -> int:
    """Tokens that ran this expert; 0 where the profile does not reach so far."""
    num_layers, num_experts = profile.count_LE.shape
    if expert.layer >= num_layers or expert.expert >= num_experts:
        return 0
    return int(profile.count_LE[expert.layer, expert.expert])


def _largest(value: Tensor) -> float:
    return float(value.detach().abs().max()) if value.numel() else 0.0
