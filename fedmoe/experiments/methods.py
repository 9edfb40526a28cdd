"""All methods of one protocol, FedMoE first: same clients, same model, same start, same rounds.

What methods make of a model may differ where their start does not: sub-MoEs add up the outputs of
experts that others average, if a protocol says so (`summed`).

`core_methods` are FedMoE and what it is measured by first; `all_methods` adds the personalised
methods of the field. What only differs in how a client trains is a plan, what differs in who gets
what is a strategy, and here they are put together.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from fedmoe.data.examples import FederatedData
from fedmoe.experiments.experiment import Experiment, with_budgets
from fedmoe.federated.fedavg import FedAvg, FixedSubMoE, choice_by_group, random_choice
from fedmoe.federated.fedmoe import FedMoE
from fedmoe.federated.local import LocalPlan, fedper, fedrep
from fedmoe.federated.methods.aligned import Aligned
from fedmoe.federated.methods.apfl import APFL
from fedmoe.federated.methods.clusters import BestMember, by_mass
from fedmoe.federated.methods.ditto import Ditto
from fedmoe.federated.methods.flame import frequency_power
from fedmoe.federated.methods.personal import (
    is_classifier,
    is_classifier_or_norm,
    is_moe,
    is_norm,
    is_not_shared_extractor,
)
from fedmoe.federated.methods.pruning import FrequencyPruning
from fedmoe.federated.methods.scaffold import Controlled, Scaffold
from fedmoe.federated.methods.slices import FedRolex, HeteroFL
from fedmoe.federated.per_group import PerGroup
from fedmoe.federated.rounds import Schedule
from fedmoe.nn.gates.ranking import RankingGate
from fedmoe.nn.init import seeded
from fedmoe.nn.members import ChosenGate, Members, of_gate
from fedmoe.state import NameTest, everything, moe_layers, split_state
from fedmoe.types import Strategy
from fedmoe.wire.codecs import Int8
from fedmoe.wire.packing import Codecs

Methods = Mapping[str, Experiment]
Factory = Callable[[], nn.Module]
Shares = Sequence[float]

GATE_HIDDEN = 32  # of FedMix's personal gate
# What holds sub-MoEs, and what each keeps on the client if its classifier stays there.
WITH_CLASSIFIER: Mapping[str, NameTest] = {
    "fedmoe": is_classifier,
    "random": is_classifier,
    "fedmoe-int8": is_classifier,
    "fedmoe-mean": is_classifier,
    "fedmoe-norm": is_classifier_or_norm,
}
CODED = ("fedmoe", "fedavg")  # what there is with a byte a number on the wire, too

# Experts take fewer levels, which compress better. On the way up the error is right on average,
# and averaged over clients too, so it may be larger there.
INT8_DOWN = Codecs(Int8(), Int8(levels=47))
INT8_UP = Codecs(Int8(), Int8(levels=31))


@dataclass(frozen=True)
class OtherModels:
    """Models that some methods train in place of the protocol's own.

    A method whose model is None is left out: the protocol has no such model.
    """

    clusters: Factory | None = None  # IFCA: whole models, one of which a client chooses
    mixture: Factory | None = None  # FedMix: whole models under a gate of the client's own
    extractors: Factory | None = None  # pFedMoE: a private and a shared feature extractor
    normed: Factory | None = None  # FedBN: the protocol's own with normalisation layers
    normed_clusters: Factory | None = None  # those of IFCA with normalisation layers


def core_methods(
    name: str,
    data: FederatedData,
    factory: Factory,
    plan: LocalPlan,
    schedule: Schedule,
    shares: Shares,
    fedmoe: FedMoE,
    *,
    summed: Factory | None = None,
    lr_of: Mapping[str, float] | None = None,
    proximal: float = 0.01,
) -> dict[str, Experiment]:
    """FedMoE, its comparators and, where groups are known, the upper marks as controls.

    Args:
        shares: memory budgets, as shares of the experts; they go round over the clients.
        summed: what FedMoE and other choices of sub-MoEs train: `factory`'s model, of the same
            start, but with as many experts for a token as the smallest device holds, and their
            outputs added up. A sub-MoE is then one layer as wide as all its experts. None: they
            train `factory`'s.
        lr_of: learning rates of methods that do better with another than the plan's.
        proximal: FedProx's mu.
    """
    model = split_state(factory())
    clients = with_budgets(data, model, shares)
    base = Experiment(name, "fedavg", factory, FedAvg(), plan, data, clients, schedule)
    own = with_experts_enough(replace(base, method="fedmoe", strategy=fedmoe), summed)
    runs = [
        own,
        replace(
            own,
            method="random",
            strategy=FixedSubMoE(choice=random_choice(model, clients, schedule.seed)),
        ),
        base,
        replace(base, method="fedprox", plan=replace(plan, proximal=proximal)),
        replace(base, method="local", plan=replace(plan, personal=everything)),
    ]
    if data.groups:
        known = choice_by_group(model, clients, data.groups)
        runs += [
            replace(
                own, method="chosen-by-group", strategy=FixedSubMoE(choice=known), control=True
            ),
            replace(
                base, method="fedavg-per-group", strategy=PerGroup(data.groups), control=True
            ),
        ]
    return _at_rates(runs, lr_of)


def with_experts_enough(run: Experiment, factory: Factory | None) -> Experiment:
    """A run of FedMoE or its like on another model (None: its own), which gives every client as
    many experts of a layer as a token of that model uses.
    """
    if factory is None:
        return run
    assert isinstance(run.strategy, FedMoE)
    k = max(int(getattr(moe.gate, "k", 1)) for _, moe in moe_layers(factory()))
    strategy = replace(run.strategy, min_experts=max(k, run.strategy.min_experts))
    return replace(run, factory=factory, strategy=strategy)


def all_methods(
    name: str,
    data: FederatedData,
    factory: Factory,
    plan: LocalPlan,
    schedule: Schedule,
    shares: Shares,
    fedmoe: FedMoE,
    *,
    summed: Factory | None = None,
    lr_of: Mapping[str, float] | None = None,
    proximal: float = 0.01,
    ditto_pull: float = 0.1,
    head: NameTest = is_classifier,
    others: OtherModels = OtherModels(),
) -> dict[str, Experiment]:
    """The core methods, and after them the personalised methods of the field.

    Fine-tuning is `fedavg` judged after local training, as every method is judged both ways; the
    full MoE without a memory limit is `fedavg` too. Methods that split the model (`fedper`,
    `fedrep`) keep `head` on the client, `fedper-moe` the whole MoE layer. `fedrep` trains its head
    for as many epochs as its body, so twice as long as the others. Methods with a model of their
    own are there if `others` has it. Of these `ifca`, `fedmix` and `pfedmoe` know no limit of
    memory, and `fedavg-norm` is what `fedbn` is to be compared with; `fedmoe-norm` is FedMoE on
    that model, its normalisation on the client too, and `ifca-norm` what that is to be compared
    with. Where `summed` is given, `fedmoe-mean` is FedMoE on the others' model, and `fedavg-sum`
    and `local-sum` are FedAvg and local training on FedMoE's. `fedmoe-int8` and `fedavg-int8` are
    `fedmoe` and `fedavg` with their messages coded.

    Args:
        shares, summed, lr_of, proximal: see `core_methods`.
        ditto_pull: Ditto's lambda.
        head: the classifier of the model; the default fits experts that each own a slice of it.
        others: models of methods that do not train the protocol's own.
    """
    runs = core_methods(
        name,
        data,
        factory,
        plan,
        schedule,
        shares,
        fedmoe,
        summed=summed,
        lr_of=lr_of,
        proximal=proximal,
    )
    base = replace(runs["fedavg"], plan=plan)
    epochs = sum(phase.epochs for phase in plan.phases)
    pruning = FrequencyPruning(min_experts=fedmoe.min_experts, seed=fedmoe.seed)
    pruned = replace(base, method="frequency-pruning", strategy=pruning)
    plans = {
        "ditto": replace(plan, method=Ditto(ditto_pull)),
        "apfl": replace(plan, method=APFL()),
        "fedper": fedper(head, plan),
        "fedper-moe": fedper(is_moe, plan),
        "fedrep": fedrep(head, plan, head_epochs=epochs),
    }
    strategies: dict[str, Strategy[Any]] = {
        "heterofl": HeteroFL(),
        "fedrolex": FedRolex(),
        "flame": FedAvg(weigh=frequency_power(2)),
        "fedalign": Aligned(),
    }
    more = [
        replace(
            base,
            method="scaffold",
            strategy=Scaffold(),
            plan=replace(plan, method=Controlled()),
        ),
        *(replace(base, method=m, plan=its_plan) for m, its_plan in plans.items()),
        *(replace(base, method=m, strategy=strategy) for m, strategy in strategies.items()),
        with_experts_enough(pruned, summed),
        *_of_both_models(base, fedmoe, summed),
        *_of_other_models(base, fedmoe, others, shares),
    ]
    coded = [
        replace(runs[m], method=f"{m}-int8", down=INT8_DOWN, up=INT8_UP) for m in CODED
    ]
    return runs | _at_rates(more, lr_of) | {e.method: e for e in coded}


def _of_both_models(
    base: Experiment, fedmoe: FedMoE, summed: Factory | None
) -> list[Experiment]:
    """FedMoE on the others' model, and what others make of FedMoE's."""
    if summed is None:
        return []
    theirs = replace(base, method="fedavg-sum", factory=summed)
    alone = replace(base.plan, personal=everything)
    return [
        replace(base, method="fedmoe-mean", strategy=fedmoe),
        theirs,
        replace(theirs, method="local-sum", plan=alone),
    ]


def _of_other_models(
    base: Experiment, fedmoe: FedMoE, others: OtherModels, shares: Shares
) -> list[Experiment]:
    """The methods that train another model; plans of those without sparse gates do not balance."""

    plan = base.plan
    runs: list[Experiment] = []
    if others.normed is not None:
        clients = with_budgets(base.data, split_state(others.normed()), shares)
        normed = replace(base, method="fedavg-norm", factory=others.normed, clients=clients)
        private = replace(normed, plan=replace(plan, personal=is_norm))
        runs += [
            normed,
            replace(private, method="fedbn"),
            replace(private, method="fedmoe-norm", strategy=fedmoe),
        ]
    dense = replace(plan, balance=0.0)
    whole = replace(base, clients=tuple(replace(c, memory_bytes=None) for c in base.clients))
    choosing = replace(whole, plan=replace(dense, method=BestMember()))
    if others.clusters is not None:
        runs.append(replace(choosing, method="ifca", factory=others.clusters))
    if others.normed_clusters is not None:
        # Averaged as all else: a client with norms of its own would stay with its first choice,
        # the only model whose norms have seen its data.
        runs.append(replace(choosing, method="ifca-norm", factory=others.normed_clusters))
    if others.mixture is not None:
        mixing = replace(dense, personal=of_gate)
        by_gate = FedAvg(weigh=by_mass)
        runs.append(
            replace(
                whole, method="fedmix", factory=others.mixture, strategy=by_gate, plan=mixing
            )
        )
    if others.extractors is not None:
        apart = replace(dense, personal=is_not_shared_extractor)
        runs.append(replace(whole, method="pfedmoe", factory=others.extractors, plan=apart))
    return runs


def _at_rates(
    runs: Sequence[Experiment], lr_of: Mapping[str, float] | None
) -> dict[str, Experiment]:
    """By method, each at its own learning rate if it has one."""
    rates = lr_of or {}
    return {
        r.method: replace(r, plan=replace(r.plan, lr=rates.get(r.method, r.plan.lr)))
        for r in runs
    }


def with_own_classifier(runs: Methods) -> dict[str, Experiment]:
    """The same runs, but FedMoE in all its forms and the random sub-MoE keep their classifier on
    the client.

    For clients whose labels, or what stands for them, differ: an average serves none of them.
    """
    own = {
        m: replace(runs[m], plan=fedper(test, runs[m].plan))
        for m, test in WITH_CLASSIFIER.items()
        if m in runs
    }
    return {**runs, **own}


def clusters_of(
    member: Callable[..., nn.Module],
    num_members: int,
    num_classes: int,
    input_shape: Sequence[int],
    seed: int = 0,
) -> Members:
    """Whole models under a gate that is set from outside.

    Args:
        member: makes one of them, by its argument `seed`; each gets another seed, since models
            that start alike would stay alike.
    """
    return Members(
        ChosenGate(num_members), _members(member, num_members, seed), num_classes, input_shape
    )


def mixture_of(
    member: Callable[..., nn.Module],
    num_members: int,
    num_classes: int,
    input_shape: Sequence[int],
    seed: int = 0,
) -> Members:
    """As `clusters_of`, under a small gate on the input that mixes the models' probabilities."""
    width = int(np.prod(input_shape))
    gate = partial(RankingGate, width, GATE_HIDDEN, num_members, use="weighted")
    members = _members(member, num_members, seed)
    return Members(seeded(gate, seed), members, num_classes, input_shape)


def _members(
    member: Callable[..., nn.Module], num_members: int, seed: int
) -> list[nn.Module]:
    seeds = np.random.SeedSequence([seed, num_members]).generate_state(num_members)
    return [member(seed=int(s)) for s in seeds]
