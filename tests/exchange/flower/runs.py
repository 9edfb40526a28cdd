"""Experiments of a few numbers, by `module:function`, for tests and the processes they start."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from torch import nn

from fedmoe.experiments.experiment import Experiment
from fedmoe.federated.fedmoe import FedMoE
from fedmoe.federated.local import fedper
from fedmoe.federated.rounds import Schedule
from fedmoe.nn.experts.ffn import FFN
from fedmoe.nn.gates.topk import TopKGate
from fedmoe.nn.init import seeded
from fedmoe.nn.moe import MoE
from fedmoe.wire.codecs import BF16, Int8
from fedmoe.wire.packing import Codecs
from tests.tiny import CLASSES, IN, D, experiment, federated_data

TARGET = "tests.exchange.flower.runs:small"


class Wide(nn.Module):
    """As `Tiny`, but its experts are large enough to be worth a place in a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(IN, D)
        self.head = MoE(TopKGate(D, 4, 1), {e: FFN(D, 64, CLASSES) for e in range(4)}, 4)

    def forward(self, x_NI):
        return self.head(self.stem(x_NI).tanh())


def wide() -> Wide:
    return seeded(Wide, 0)


def is_stem(name: str) -> bool:
    return name.startswith("stem.")


def small(seed: int = 0, rounds: int = 2, lr: float = 0.1) -> Mapping[str, Experiment]:
    """Four clients: everybody trains everything, or keeps the stem, or explores and selects.

    With "guests" come two who never train; the experts of "wide" are worth a place in a cache, and
    its messages are coded in "coded".
    """
    plain = experiment(schedule=Schedule(rounds, seed=seed))
    plain = replace(plain, plan=replace(plain.plan, lr=lr))
    six = federated_data(6)
    return {
        "fedavg": plain,
        "fedper": replace(plain, method="fedper", plan=fedper(is_stem, plain.plan)),
        "fedmoe": replace(plain, method="fedmoe", strategy=FedMoE()),
        "guests": replace(
            plain, method="guests", data=six, clients=six.clients[:4], unseen=six.clients[4:]
        ),
        "wide": replace(plain, method="wide", factory=partial(wide)),
        "coded": replace(
            plain,
            method="coded",
            factory=partial(wide),
            down=Codecs.of(BF16()),
            up=Codecs.of(Int8()),
        ),
    }
