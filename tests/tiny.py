"""A model, data and clients of a few numbers each, for tests of what is built on them."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import nn

from fedmoe.data.examples import ClientData, Examples, FederatedData
from fedmoe.experiments.experiment import Experiment
from fedmoe.federated.fedavg import FedAvg
from fedmoe.federated.local import LocalPlan, Phase
from fedmoe.federated.rounds import Schedule
from fedmoe.nn.experts.ffn import FFN
from fedmoe.nn.gates.topk import TopKGate
from fedmoe.nn.init import seeded
from fedmoe.nn.moe import MoE
from fedmoe.types import ActivationProfile, ClientInfo, ClientUpdate, ExpertId, MoEState

IN, D, CLASSES = 3, 4, 2


class Tiny(nn.Module):
    """A linear stem and one MoE layer of four experts that makes the logits."""

    def __init__(self, num_experts: int, k: int) -> None:
        super().__init__()
        self.stem = nn.Linear(IN, D)
        experts = {e: FFN(D, 3, CLASSES) for e in range(num_experts)}
        self.head = MoE(TopKGate(D, num_experts, k), experts, num_experts)

    def forward(self, x_NI):
        return self.head(self.stem(x_NI).tanh())


def tiny(num_experts: int = 4, k: int = 1, seed: int = 0) -> Tiny:
    return seeded(lambda: Tiny(num_experts, k), seed)


class Ragged(nn.Module):
    """Two MoE layers, of three experts and of two, with a normalisation that counts batches."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(IN)
        self.first = MoE(TopKGate(IN, 3, 2), {e: FFN(IN, 2, D) for e in range(3)}, 3)
        self.second = MoE(TopKGate(D, 2, 1), {e: FFN(D, 3, CLASSES) for e in range(2)}, 2)

    def forward(self, x_NI):
        return self.second(self.first(self.norm(x_NI)))


def ragged(seed: int = 0) -> Ragged:
    return seeded(Ragged, seed)


def examples(num: int, seed: int, centre: float = 0.0, flip: bool = False) -> Examples:
    """Points about `centre`; the label says on which side of it their first number is."""
    generator = torch.Generator().manual_seed(seed)
    x_NI = torch.randn(num, IN, generator=generator) + centre
    y_N = ((x_NI[:, 0] > centre) != flip).long()
    return Examples(x_NI, y_N)


def client_data(client: int, num_train: int = 12) -> ClientData:
    """Even clients have one kind of data, odd ones another, with the opposite labels."""
    odd = client % 2 == 1
    centre = 2.0 if odd else -2.0
    return ClientData(
        examples(num_train, 1000 + client, centre, odd),
        examples(6, 2000 + client, centre, odd),
        examples(6, 3000 + client, centre, odd),
    )


def federated_data(num_clients: int = 4) -> FederatedData:
    def load(client: int) -> ClientData:
        if client not in range(num_clients):
            raise ValueError(f"client must be below {num_clients}, got {client}")
        return client_data(client)

    clients = tuple(ClientInfo(k, num_examples=12) for k in range(num_clients))
    groups = {k: "odd" if k % 2 else "even" for k in range(num_clients)}
    return FederatedData("tiny", clients, load, CLASSES, "tiny-partition", groups)


def experiment(**changes: object) -> Experiment:
    """Four clients, three rounds; `changes` replace its fields."""
    data = federated_data()
    plan = LocalPlan((Phase(epochs=1),), lr=0.1, momentum=0.5, batch_size=5)
    fields = {
        "name": "tiny",
        "method": "fedavg",
        "factory": partial(tiny, seed=0),
        "strategy": FedAvg(),
        "plan": plan,
        "data": data,
        "clients": data.clients,
        "schedule": Schedule(3, seed=0),
    }
    return Experiment(**(fields | changes))


def number(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor([value], dtype=dtype)


def one_layer(shared: float, *experts: float | None) -> MoEState:
    """A state of one number for the shared part and each expert; None: it has not that expert."""
    held = {ExpertId(0, e): {"v": number(v)} for e, v in enumerate(experts) if v is not None}
    return MoEState({"w": number(shared)}, held)


def profile(*rows: list[int]) -> ActivationProfile:
    """Of these counts; every activation had weight and score 1."""
    count_LE = torch.tensor(rows, dtype=torch.int64).reshape(len(rows), -1)
    share_LE = count_LE.double()
    return ActivationProfile(count_LE, share_LE, share_LE.clone(), count_LE.sum(-1))


def update(
    client: int,
    model: MoEState,
    count: list[int] | None = None,
    num_examples: int = 1,
    metrics: Mapping[str, float] | None = None,
) -> ClientUpdate:
    return ClientUpdate(client, num_examples, model, profile(count or [0] * 4), metrics or {})
