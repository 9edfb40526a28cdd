"""FedMoE and what it is compared with, on Fashion-MNIST: *domains* and *published*.

Each function returns the methods of one protocol by name: same clients, same model, same start,
same number of rounds.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Literal

from torch import nn

from fedmoe.data.examples import FederatedData
from fedmoe.data.protocols import domains as domains_data
from fedmoe.data.protocols import published as published_data
from fedmoe.experiments.experiment import Experiment, with_budgets
from fedmoe.federated.fedavg import FedAvg, FixedSubMoE, choice_by_group, random_choice
from fedmoe.federated.fedmoe import FedMoE, as_published
from fedmoe.federated.local import LocalPlan, Phase
from fedmoe.federated.per_group import PerGroup
from fedmoe.federated.rounds import Schedule
from fedmoe.nn.vision import fashion_cnn
from fedmoe.state import everything, split_state

Methods = Mapping[str, Experiment]
K = 2  # experts per token, and so the fewest per layer that a client can do with


def methods(
    name: str,
    data: FederatedData,
    factory: Callable[[], nn.Module],
    plan: LocalPlan,
    schedule: Schedule,
    shares: tuple[float, ...],
    fedmoe: FedMoE,
    *,
    lr_of: Mapping[str, float] | None = None,
    proximal: float = 0.01,
) -> dict[str, Experiment]:
    """FedMoE, its comparators and, where groups are known, the upper marks as controls.

    Args:
        shares: memory budgets, as shares of the experts; they go round over the clients.
        lr_of: learning rates of methods that do better with another than the plan's.
    """
    model = split_state(factory())
    clients = with_budgets(data, model, shares)
    base = Experiment(name, "fedmoe", factory, fedmoe, plan, data, clients, schedule)
    seed = schedule.seed

    def variant(method: str, **changes: object) -> Experiment:
        return replace(base, method=method, **changes)  # type: ignore[arg-type]

    runs = [
        base,
        variant("random", strategy=FixedSubMoE(choice=random_choice(model, clients, seed))),
        variant("fedavg", strategy=FedAvg()),
        variant("fedprox", strategy=FedAvg(), plan=replace(plan, proximal=proximal)),
        variant("local", strategy=FedAvg(), plan=replace(plan, personal=everything)),
    ]
    if data.groups:
        known = choice_by_group(model, clients, data.groups)
        runs += [
            variant("chosen-by-group", strategy=FixedSubMoE(choice=known), control=True),
            variant("fedavg-per-group", strategy=PerGroup(data.groups), control=True),
        ]
    rates = lr_of or {}
    return {
        r.method: replace(r, plan=replace(r.plan, lr=rates.get(r.method, r.plan.lr)))
        for r in runs
    }


def domains(
    seed: int = 0,
    rounds: int = 40,
    *,
    shares: tuple[float, ...] = (0.25,),
    name: str = "domains",
    theta_cap: float = 1.0,
) -> Methods:
    """24 clients of four domains, each with its own order of labels; 200 images a client.

    Every device holds a quarter of the experts, so FedMoE and the random sub-MoE hold the same
    number of them.
    """
    plan = LocalPlan((Phase(epochs=2),), lr=0.2, batch_size=20, balance=0.01, clip=1.0)
    return methods(
        name,
        domains_data(seed),
        partial(fashion_cnn, k=K, seed=seed),
        plan,
        Schedule(rounds, seed, evaluate_every=10),
        shares,
        FedMoE(min_experts=K, theta_cap=theta_cap, seed=seed),
        # Chosen by simulations/tune_fashion.py; the last two diverge late at 0.2.
        lr_of={"local": 0.1, "fedprox": 0.1, "fedavg-per-group": 0.1},
    )


def domains_devices(seed: int = 0, rounds: int = 40) -> Methods:
    """*domains* on devices that hold 25, 50, 75 and 100 % of the experts.

    Large devices need not fill up: FedMoE stops at experts for nine tenths of what a client asks
    for. Some clients can explore the full model here, so FedMoE as published can run too.
    """
    shares = (0.25, 0.5, 0.75, 1.0)
    runs = dict(domains(seed, rounds, shares=shares, name="domains-devices", theta_cap=0.9))
    published = replace(as_published(), min_experts=K, seed=seed)
    return {
        "fedmoe": runs.pop("fedmoe"),
        "fedmoe-published": replace(
            runs["random"], method="fedmoe-published", strategy=published
        ),
        **runs,
    }


def demo(seed: int = 0, rounds: int = 12) -> Methods:
    """*domains-devices*, shorter, with the main comparators only."""
    runs = domains_devices(seed, rounds)
    wanted = ("fedmoe", "random", "fedavg", "local")
    schedule = Schedule(rounds, seed, evaluate_every=6)
    return {m: replace(runs[m], name="demo", schedule=schedule) for m in wanted}


def published(
    seed: int = 0,
    rounds: int = 20,
    *,
    partition: Literal["dirichlet", "pathological"] = "dirichlet",
    share: float = 1.0,
) -> Methods:
    """20 clients over all images (or a share), skewed labels: as public leaderboards have it."""
    plan = LocalPlan((Phase(epochs=1),), lr=0.005, batch_size=10, balance=0.01, clip=1.0)
    data = published_data(seed, partition=partition, share=share)
    return methods(
        data.name,
        data,
        partial(fashion_cnn, k=K, seed=seed),
        plan,
        Schedule(rounds, seed, evaluate_every=10),
        (0.25, 0.5, 0.75, 1.0),
        FedMoE(min_experts=K, theta_cap=0.9, seed=seed),
    )
