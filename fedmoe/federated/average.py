"""Averaging what clients send back, expert by expert: what counts how much."""

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass

from fedmoe.federated.sums import Sums
from fedmoe.types import ActivationProfile, ClientUpdate, ExpertId, MoEState, Term

SHARED: Hashable = "shared"  # the key of the mean of shared parameters; experts' are their ids

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


@dataclass(frozen=True)
class ByExpert:
    """The terms of an update for a mean of each expert over those who held it, and of the rest.

    An expert, and its gate row with it, weighs what `weigh` says, shared parameters what
    `weigh_shared` says.
    """

    weigh: Weigh = by_tokens
    weigh_shared: WeighShared = shared_by_examples

    def __call__(self, update: ClientUpdate) -> Iterator[Term]:
        if update.model.shared:
            yield Term(SHARED, update.model.shared, self.weigh_shared(update))
        for e, state in update.model.experts.items():
            yield Term(e, state, self.weigh(update, e))


def averaged(model: MoEState, sums: Sums) -> MoEState:
    """The model of these means; what has none keeps the parameters it has in `model`.

    Raises:
        ValueError: there are means of experts or parameters that the model has not.
    """
    for key in sums:
        if isinstance(key, ExpertId) and key not in model.experts:
            raise ValueError(f"expert {key.expert} of layer {key.layer} is not in the model")
    return MoEState(
        sums.mean(SHARED, model.shared),
        {e: sums.mean(e, state) for e, state in model.experts.items()},
    )


def average_by_expert(
    model: MoEState,
    updates: Iterable[ClientUpdate],
    weigh: Weigh = by_tokens,
    weigh_shared: WeighShared = shared_by_examples,
) -> MoEState:
    """Average each expert over the clients that held it, and the rest over all clients.

    Weights are those of `ByExpert`; what weighs 0 is left out. An expert with one holder is copied
    bit for bit; one that nobody used keeps the parameters it has in `model`. (FedMoE, Mei et al.
    2024, arXiv:2408.11304, modular aggregation; weights by tokens are ours.)
    """
    sums, terms = Sums(), ByExpert(weigh, weigh_shared)
    for update in updates:
        sums.add(terms(update))
    return averaged(model, sums)


def tokens_of(profile: ActivationProfile, expert: ExpertId) -> int:
    """Tokens that ran this expert; 0 where the profile does not reach so far."""
    num_layers, num_experts = profile.count_LE.shape
    if expert.layer >= num_layers or expert.expert >= num_experts:
        return 0
    return int(profile.count_LE[expert.layer, expert.expert])
