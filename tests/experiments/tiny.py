"""Experiments that run in a second: a linear stem, a MoE of 4 experts, 4 clients of two groups."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from fedmoe.data.examples import ClientData, Examples, FederatedData
from fedmoe.experiments.experiment import Experiment, with_budgets
from fedmoe.federated.fedavg import FedAvg
from fedmoe.federated.fedmoe import FedMoE
from fedmoe.federated.local import LocalPlan
from fedmoe.federated.rounds import Schedule
from fedmoe.nn.experts.ffn import FFN
from fedmoe.nn.gates.topk import TopKGate
from fedmoe.nn.init import seeded
from fedmoe.nn.moe import MoE
from fedmoe.state import everything, split_state
from fedmoe.types import ClientInfo

DIM, CLASSES = 6, 3


def tiny_model() -> nn.Module:
    def build() -> nn.Module:
        experts = {e: FFN(DIM, 8, CLASSES) for e in range(4)}
        return nn.Sequential(nn.Linear(DIM, DIM), MoE(TopKGate(DIM, 4, k=1), experts, 4))

    return seeded(build, 3)


def tiny_data(client: int) -> ClientData:
    """Classes are directions; odd clients see them with the sign turned."""
    g = torch.Generator().manual_seed(client)
    y = torch.randint(CLASSES, (24,), generator=g)
    x = nn.functional.one_hot(y, DIM) * 2.0 + 0.3 * torch.randn(24, DIM, generator=g)
    x = -x if client % 2 else x
    return ClientData(*(Examples(x[i::3].contiguous(), y[i::3].contiguous()) for i in range(3)))


def tiny(seed: int = 0, rounds: int = 3) -> Mapping[str, Experiment]:
    """FedMoE, FedAvg and training alone."""
    clients = tuple(ClientInfo(i, num_examples=8) for i in range(4))
    groups = {i: "turned" if i % 2 else "upright" for i in range(4)}
    data = FederatedData("tiny", clients, tiny_data, CLASSES, "0123456789abcdef", groups)
    budgets = with_budgets(data, split_state(tiny_model()), (0.5, 1.0))
    plan, schedule = LocalPlan(lr=0.1, batch_size=4), Schedule(rounds, seed)
    own = Experiment(
        "tiny", "fedmoe", tiny_model, FedMoE(smooth_over=1), plan, data, budgets, schedule
    )
    alone = replace(plan, personal=everything)
    return {
        "fedmoe": own,
        "fedavg": replace(own, method="fedavg", strategy=FedAvg()),
        "local": replace(own, method="local", strategy=FedAvg(), plan=alone),
    }


def broken(seed: int = 0, rounds: int = 3) -> Mapping[str, Experiment]:
    """As `tiny`, but one run cannot start: a client's memory is below one expert."""
    runs = dict(tiny(seed, rounds))
    starved = tuple(replace(c, memory_bytes=10) for c in runs["fedmoe"].clients)
    return {**runs, "fedmoe": replace(runs["fedmoe"], clients=starved)}
