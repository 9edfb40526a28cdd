"""Nearest prototype on a frozen encoder: each class is where its examples are on average.

Prototypes: Snell et al. 2017, arXiv:1703.05175; exchanged between clients: FedProto, Tan et al.
2022, arXiv:2105.00243. Here a client sends, for each class, the sum of its features and their
count, and nothing else is learned: one round, and everybody has the means over all clients.

It is FedAvg in which every client weighs the same: the mean of sums over the mean of counts is the
mean over all examples.
"""

from typing import Protocol, cast

import torch
from torch import Tensor, nn

from fedmoe.federated.frozen import FedAvgOnFrozen
from fedmoe.federated.local import LocalMethod, LocalTask, Trained
from fedmoe.state import NameTest
from fedmoe.types import ActivationProfile, ClientUpdate


class Fits(Protocol):
    """A head that is computed from examples, as `fedmoe.nn.encoder.PrototypeHead` is."""

    def fit(self, feature_NF: Tensor, y_N: Tensor) -> None: ...


def prototypes(frozen: NameTest) -> FedAvgOnFrozen:
    """The server's side, for a model whose encoder `frozen` names; one round is enough."""
    return FedAvgOnFrozen(frozen=frozen, weigh_shared=alike)


def alike(update: ClientUpdate) -> int:
    """Every client weighs the same."""
    return 1


class Prototypes(LocalMethod):
    """The client's side: the head of `task.model` becomes that of the client's own examples.

    The model must be an `Encoded` whose head fits; the data, its features.
    """

    def train(self, task: LocalTask) -> Trained:
        x_NF, y_N = (t.to(task.device) for t in task.examples)
        cast(Fits, task.model.get_submodule("head")).fit(x_NF, y_N)
        with torch.no_grad():
            loss = nn.functional.cross_entropy(task.model(x_NF), y_N)
        return Trained(ActivationProfile.empty(0, 0), float(loss))
