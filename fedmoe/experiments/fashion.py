"""FedMoE and what it is compared with, on images: *domains*, *published* and their kin.

Each function returns the methods of one protocol by name: same clients, same model, same start,
same number of rounds. Sub-MoEs add up the outputs of four experts, which every device can hold;
other methods on the model of experts average those of two, as Mixtral does.
"""

from dataclasses import replace
from functools import partial
from typing import Literal

from fedmoe.data.examples import FederatedData
from fedmoe.data.protocols import dirichlet as dirichlet_data
from fedmoe.data.protocols import domains as domains_data
from fedmoe.data.protocols import published as published_data
from fedmoe.data.protocols import two_domains as two_domains_data
from fedmoe.experiments.methods import (
    Methods,
    OtherModels,
    Shares,
    all_methods,
    clusters_of,
    mixture_of,
    with_own_classifier,
)
from fedmoe.federated.fedmoe import FedMoE, as_published
from fedmoe.federated.local import LocalPlan, Phase
from fedmoe.federated.rounds import Schedule
from fedmoe.nn.extractors import fashion_extractors
from fedmoe.nn.vision import dense_cnn, fashion_cnn

IMAGE = (1, 28, 28)
CLASSES = 10
DEVICES = (0.25, 0.5, 0.75, 1.0)  # shares of the experts that devices hold
K = 2  # experts per token of the model that is no sub-MoE's
CLIENTS = 24  # of *domains*
VALIDATION, TEST = 100 * CLIENTS, 300 * CLIENTS  # images of all of them
HELD = 4  # of the 16 experts, by the smallest device, and so of a sub-MoE per token
IN_GROUPS = FedMoE(min_experts=K, kinship=1.0)
# Most come after the first round: groups found then would be those of ten clients, and scouting in
# a round of its own would take a fifth of a client's rounds.
FEW_A_ROUND = FedMoE(min_experts=K, ask_newcomers=True)


def domains(
    seed: int = 0,
    rounds: int = 40,
    *,
    train: int = 200,
    num_clients: int = CLIENTS,
    shares: Shares = (0.25,),
    name: str = "domains",
    theta_cap: float = 1.0,
    drop_out: float = 0.0,
) -> Methods:
    """24 clients of four domains, each with its own order of labels; `train` images a client.

    Every device holds a quarter of the experts, so FedMoE and the random sub-MoE hold the same
    number of them. However many clients there are, all of them together are judged on as many
    images.
    """
    # The learning rate is the best of 0.2 and 0.4 for FedMoE, FedAvg and local training alike
    # (simulations/tune_fashion.py).
    plan = LocalPlan((Phase(epochs=2),), lr=0.4, batch_size=20, balance=0.01, clip=1.0)
    schedule = Schedule(rounds, seed, evaluate_every=10, drop_out=drop_out)
    data = domains_data(
        seed,
        train=train,
        validation=VALIDATION // num_clients,
        test=TEST // num_clients,
        num_clients=num_clients,
    )
    fedmoe = replace(IN_GROUPS, theta_cap=theta_cap)
    return _on_images(name, data, plan, schedule, shares, fedmoe)


def domains_devices(seed: int = 0, rounds: int = 40) -> Methods:
    """*domains* on devices that hold 25, 50, 75 and 100 % of the experts.

    Large devices need not fill up: FedMoE stops at experts for nine tenths of what a client asks
    for. Some clients can explore the full model here, so FedMoE as published can run too.
    """
    runs = dict(domains(seed, rounds, shares=DEVICES, name="domains-devices", theta_cap=0.9))
    published = replace(as_published(), min_experts=HELD, seed=seed)
    return {
        "fedmoe": runs.pop("fedmoe"),
        "fedmoe-published": replace(
            runs["random"], method="fedmoe-published", strategy=published
        ),
        **runs,
    }


def demo(seed: int = 0, rounds: int = 8) -> Methods:
    """*domains-devices*, shorter, with the main comparators only."""
    runs = domains_devices(seed, rounds)
    wanted = ("fedmoe", "random", "fedavg", "local")
    schedule = Schedule(rounds, seed, evaluate_every=4)
    return {m: replace(runs[m], name="demo", schedule=schedule) for m in wanted}


def two_domains(seed: int = 0, rounds: int = 20) -> Methods:
    """24 clients, half with digits and half with clothes, which share the numbers of ten labels."""
    # The best of 0.1, 0.2 and 0.4 for FedMoE and of the last two for FedAvg, on validation data.
    plan = LocalPlan((Phase(epochs=2),), lr=0.4, batch_size=20, balance=0.01, clip=1.0)
    schedule = Schedule(rounds, seed, evaluate_every=10)
    data = two_domains_data(seed)
    return _on_images("two-domains", data, plan, schedule, (0.25,))


def published(
    seed: int = 0,
    rounds: int = 20,
    *,
    partition: Literal["dirichlet", "pathological"] = "dirichlet",
    share: float = 1.0,
    rate: Literal["tuned", "published"] = "tuned",
) -> Methods:
    """20 clients over all images (or a share), skewed labels: as public leaderboards have it.

    Args:
        rate: "tuned" for our number of rounds, or "published": plain SGD at 0.005, made for
            hundreds of rounds.
    """
    data = published_data(seed, partition=partition, share=share)
    runs = _on_skewed(data, Schedule(rounds, seed, evaluate_every=10))
    if rate == "tuned":
        return runs
    return {
        m: replace(e, plan=replace(e.plan, lr=0.005, lr_decay=1.0, clip=None))
        for m, e in runs.items()
    }


def dirichlet(seed: int = 0, rounds: int = 20, *, alpha: float, share: float = 0.2) -> Methods:
    """As *published-fifth*, with another skew of labels."""
    data = dirichlet_data(seed, alpha, share=share)
    return _on_skewed(data, Schedule(rounds, seed, evaluate_every=10))


def hundred(seed: int = 0, rounds: int = 50, *, alpha: float = 0.1) -> Methods:
    """100 clients over all images, of whom ten take part in a round.

    FedMoE's clients scout in the round in which they first train, and share one common part.
    """
    data = dirichlet_data(seed, alpha, num_clients=100)
    schedule = Schedule(rounds, seed, clients_per_round=10, evaluate_every=10)
    return _on_skewed(data, schedule, FEW_A_ROUND)


def _on_skewed(
    data: FederatedData, schedule: Schedule, fedmoe: FedMoE = IN_GROUPS
) -> Methods:
    """Labels skewed over clients, and devices of four sizes.

    FedMoE, and the random sub-MoE like it, keep the experts' slices of the classifier on the
    client: an average over clients with different labels serves none of them.
    """
    plan = LocalPlan(
        (Phase(epochs=1),), lr=0.2, lr_decay=0.9, batch_size=10, balance=0.01, clip=1.0
    )
    fedmoe = replace(fedmoe, theta_cap=0.9)
    runs = _on_images(data.name, data, plan, schedule, DEVICES, fedmoe)
    return with_own_classifier(runs)


def _on_images(
    name: str,
    data: FederatedData,
    plan: LocalPlan,
    schedule: Schedule,
    shares: Shares,
    fedmoe: FedMoE = IN_GROUPS,
) -> Methods:
    seed = schedule.seed
    # Four models with a quarter of the hidden layer each: together as large as the CNN of experts.
    member = partial(dense_cnn, hidden=128)
    normed_member = partial(dense_cnn, hidden=128, norm="batch")
    return all_methods(
        name,
        data,
        partial(fashion_cnn, k=K, seed=seed),
        plan,
        schedule,
        shares,
        replace(fedmoe, seed=seed),
        # Of 1, 1/2, 1/4 and 1/8 of the others' rate the best on *domains*, on validation data.
        lr_of={"scaffold": plan.lr / 2},
        summed=partial(fashion_cnn, k=HELD, seed=seed, gate_mass="sum"),
        others=OtherModels(
            clusters=partial(clusters_of, member, 4, CLASSES, IMAGE, seed),
            mixture=partial(mixture_of, member, 4, CLASSES, IMAGE, seed),
            extractors=partial(fashion_extractors, seed=seed),
            normed=partial(fashion_cnn, k=K, seed=seed, norm="batch"),
            normed_clusters=partial(clusters_of, normed_member, 4, CLASSES, IMAGE, seed),
        ),
    )
