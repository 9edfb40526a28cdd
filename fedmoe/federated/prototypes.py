"""Heads on a frozen encoder that are sums over examples: prototypes and linear discriminants.

Prototypes: Snell et al. 2017, arXiv:1703.05175; exchanged between clients: FedProto, Tan et al.
2022, arXiv:2105.00243. A client sends, for each class, the sum of its features and their count,
and for a discriminant (`fedmoe.nn.discriminant`) the sum of their outer products. Nothing else is
learned: one round, and everybody has the sums over all clients.

It is FedAvg in which every client weighs the same: the mean of sums over the mean of counts is the
mean over all examples.
"""

from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from fedmoe.data.examples import Examples
from fedmoe.federated.frozen import FedAvgOnFrozen
from fedmoe.federated.local import LocalMethod, LocalTask, Trained
from fedmoe.state import NameTest
from fedmoe.types import ActivationProfile, ClientUpdate


class Fits(Protocol):
    """A head that is computed from examples, as those of `fedmoe.nn.encoder` are."""

    def fit(self, feature_NF: Tensor, y_N: Tensor) -> None: ...


def prototypes(frozen: NameTest) -> FedAvgOnFrozen:
    """The server's side, for a model whose encoder `frozen` names; one round is enough."""
    return FedAvgOnFrozen(frozen=frozen, weigh_shared=alike)


def alike(update: ClientUpdate) -> int:
    """Every client weighs the same."""
    return 1


@dataclass(frozen=True)
class Prototypes(LocalMethod):
    """The client's side: the head of `task.model` becomes that of the client's own examples.

    The model must be an `Encoded` whose head fits; the data, its features.

    Attributes:
        labels: who is served is taken to have so many labels, those with the largest summed
            probability on the examples to be told; None: any. It is what FedJETs knows of such a
            client when it sends K experts.
    """

    labels: int | None = None

    def train(self, task: LocalTask) -> Trained:
        x_NF, y_N = (t.to(task.device) for t in task.examples)
        cast(Fits, task.model.get_submodule("head")).fit(x_NF, y_N)
        with torch.no_grad():
            loss = nn.functional.cross_entropy(task.model(x_NF), y_N)
        return Trained(ActivationProfile.empty(0, 0), float(loss))

    def serve(
        self, model: nn.Module, examples: Examples, device: torch.device
    ) -> dict[str, float]:
        served = super().serve(model, examples, device)
        if self.labels is not None and len(examples.y):
            with torch.no_grad():
                p_NC = model.eval()(examples.x.to(device)).softmax(-1)
            likely_C = p_NC.sum(0).topk(min(self.labels, p_NC.shape[1])).indices
            found_N = likely_C[p_NC[:, likely_C].argmax(1)].cpu()
            served["served_test"] = float((found_N == examples.y).float().mean())
        return served
