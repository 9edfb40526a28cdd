"""Experiments of a few numbers, by `module:function`, for the processes that tests start."""

from collections.abc import Mapping
from dataclasses import replace

from fedmoe.experiments.experiment import Experiment
from fedmoe.federated.fedmoe import FedMoE
from fedmoe.federated.local import fedper
from fedmoe.federated.rounds import Schedule
from tests.tiny import experiment

TARGET = "tests.exchange.flower.runs:small"


def is_stem(name: str) -> bool:
    return name.startswith("stem.")


def small(seed: int = 0, rounds: int = 2, lr: float = 0.1) -> Mapping[str, Experiment]:
    """Four clients: everybody trains everything, or keeps the stem, or explores and selects."""
    plain = experiment(schedule=Schedule(rounds, seed=seed))
    plain = replace(plain, plan=replace(plain.plan, lr=lr))
    return {
        "fedavg": plain,
        "fedper": replace(plain, method="fedper", plan=fedper(is_stem, plain.plan)),
        "fedmoe": replace(plain, method="fedmoe", strategy=FedMoE()),
    }
