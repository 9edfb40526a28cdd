"""Averaging what clients send back: the arithmetic of aggregation, without policy.

Sums of floating-point numbers depend on their order, and updates arrive in any order. So terms
are put on a grid of whole multiples of 2**-GRID_BITS and added as 64-bit integers: the sum is the
same bit for bit whatever the order, in one process or in many. A mean is off by at most
2**-(GRID_BITS + 1) over the mean weight: 1e-11 for clients of 200 examples. Whole numbers, such as
a counter of batches, are their own grid.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedmoe.types import ActivationProfile, ClientUpdate, ExpertId, MoEState, State

GRID_BITS = 28
LIMIT = 2.0 ** (62 - GRID_BITS)  # of a sum of reaches: so that 64 bits hold it
UPDATE_LIMIT = LIMIT / 1024  # of one update, so that a thousand of the largest can be summed


@dataclass
class _Sum:
    """One parameter's sum on the grid; a lone value is kept as it came."""

    weight: int = 0
    reach: float = 0.0  # bound of |sum|
    alone: Tensor | None = None
    total: Tensor | None = None

    def fold(self, value: Tensor, weight: int, reach: float) -> None:
        if self.weight == 0:
            self.alone = value
        else:
            if self.alone is not None:
                self.total, self.alone = _on_grid(self.alone, self.weight), None
            assert self.total is not None
            self.total.add_(_on_grid(value, weight))
        self.weight, self.reach = self.weight + weight, reach

    def mean(self, dtype: torch.dtype) -> Tensor:
        if self.alone is not None:
            return self.alone
        assert self.total is not None
        value = self.total.double() / self.weight / _steps(dtype)
        return (value if dtype.is_floating_point else value.round()).to(dtype)


@dataclass
class Mean:
    """A weighted mean of states that is folded as they come; memory of one state, not of all.

    Each parameter is averaged over the states that have it. The mean of one is that one, bit for
    bit.
    """

    _sums: dict[str, _Sum] = field(default_factory=dict)

    def add(self, state: State, weight: int) -> None:
        """Fold `state` in.

        Raises:
            ValueError: weight below 1, or a value so large that the sum could overflow. Nothing
                of the state is folded then.
        """
        if weight < 1:
            raise ValueError(f"weight must be at least 1, got {weight}")
        reach = {
            n: self._sums.get(n, _Sum()).reach + reach_of(t, weight) for n, t in state.items()
        }
        for name, bound in reach.items():
            if not bound < LIMIT:  # so that NaN is refused too
                raise ValueError(
                    f"parameter {name!r}: weight times value must stay below {LIMIT:.0f} in "
                    f"sum, got {bound:.3g}"
                )
        for name, value in state.items():
            self._sums.setdefault(name, _Sum()).fold(value.detach(), weight, reach[name])

    def result(self, old: State) -> dict[str, Tensor]:
        """The mean, in the dtypes of `old`; names that were never sent keep `old`'s values."""
        return {**old, **{n: s.mean(old[n].dtype) for n, s in self._sums.items()}}


Weigh = Callable[[ClientUpdate, ExpertId], int]
WeighShared = Callable[[ClientUpdate], int]


def by_tokens(update: ClientUpdate, expert: ExpertId) -> int:
    """Tokens that the client sent this expert while training."""
    return tokens_of(update.profile, expert)


def by_examples(update: ClientUpdate, expert: ExpertId) -> int:
    """The client's examples, whatever the expert saw of them, but 0 if it saw none."""
    return update.num_examples if tokens_of(update.profile, expert) else 0


def shared_by_examples(update: ClientUpdate) -> int:
    """The client's examples."""
    return update.num_examples


def average_by_expert(
    model: MoEState,
    updates: Iterable[ClientUpdate],
    weigh: Weigh = by_tokens,
    weigh_shared: WeighShared = shared_by_examples,
) -> MoEState:
    """Average each expert over the clients that held it, and the rest over all clients.

    An expert, and its gate row with it, weighs what `weigh` says, shared parameters what
    `weigh_shared` says; what weighs 0 is left out. An expert with one holder is copied bit for
    bit; one that nobody used keeps the parameters it has in `model`. (FedMoE, Mei et al. 2024,
    arXiv:2408.11304, modular aggregation; weights by tokens are ours.)
    """
    shared, experts = Mean(), {e: Mean() for e in model.experts}
    for update in updates:
        if update.model.shared and (weight := weigh_shared(update)):
            shared.add(update.model.shared, weight)
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


def reach_of(value: Tensor, weight: int) -> float:
    """Weight times the largest magnitude, NaN if there is one; 2**-GRID_BITS of it where whole."""
    steps = _steps(value.dtype)
    if not value.is_floating_point():
        value = value.double()  # bool has no magnitude, and that of the least integer overflows
    magnitude = float(value.detach().abs().max()) if value.numel() else 0.0
    return weight * magnitude * steps / 2.0**GRID_BITS


def _on_grid(value: Tensor, weight: int) -> Tensor:
    # A product, not in place: a float64 value would be the client's own.
    return (value.to(torch.float64) * (weight * _steps(value.dtype))).round_().long()


def _steps(dtype: torch.dtype) -> float:
    """Of the grid, between two whole numbers."""
    return 2.0**GRID_BITS if dtype.is_floating_point else 1.0
