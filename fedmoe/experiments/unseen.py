"""FedJETs and what it must beat, on clients who come when the training is over: *heldout*.

Such a client brings unlabelled data of a few labels, in a combination that no other client has, and
is served at once. Every method sees the same clients, and as many of them each round. Methods with
a frozen encoder have the same one, a weak or an average common expert (`experiments.encoder`);
`-from-encoder` says that the common expert is what a method's model starts from.

Who is an anchor, and what they know, is said in `fedmoe.federated.anchors`: `fedjets` is told whose
labels do not overlap, as in the paper, and `-found` finds its anchors by itself. The gate of
`fedjets-fitted` is computed from what its anchors tell (`fedmoe.nn.gates.discriminant`), and its
experts start from the common expert.

Where an anchor has one label each, such a gate is a classifier, and choosing K experts is choosing
K labels. What is left when experts are taken away is `discriminant-chosen`: a control that knows
how many labels a client has, which `discriminant-head`, the same classifier, does not.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import nn

from fedmoe.data.examples import Examples, FederatedData
from fedmoe.data.protocols import heldout as heldout_data
from fedmoe.data.protocols import heldout_encoder_images
from fedmoe.experiments.encoder import (
    CHANNELS,
    FEATURES,
    Quality,
    common_expert,
    encoder_of,
    load_cnn,
    small_cnn,
)
from fedmoe.experiments.experiment import Experiment
from fedmoe.experiments.methods import Methods, mixture_of
from fedmoe.federated.anchors import Anchors, at_random, by_labels, by_means
from fedmoe.federated.average import by_examples
from fedmoe.federated.features import Features
from fedmoe.federated.fedavg import FedAvg
from fedmoe.federated.fedjets import FedJETs, FedJETsClient, Fitted, each_expert
from fedmoe.federated.fedmoe import FedMoE
from fedmoe.federated.frozen import FedAvgOnFrozen
from fedmoe.federated.local import LocalMethod, LocalPlan, Phase
from fedmoe.federated.methods.clusters import by_mass
from fedmoe.federated.prototypes import Prototypes, prototypes
from fedmoe.federated.rounds import Schedule
from fedmoe.federated.select import memory_for
from fedmoe.nn.classifier import StemAndHead, moe_head
from fedmoe.nn.encoder import DiscriminantHead, Encoded, PrototypeHead, of_encoder
from fedmoe.nn.experts.ffn import FFN
from fedmoe.nn.gates.discriminant import DiscriminantGate
from fedmoe.nn.gates.ranking import RankingGate
from fedmoe.nn.init import seeded
from fedmoe.nn.members import Members, Reads, of_gate
from fedmoe.nn.ranking import Ranking
from fedmoe.nn.vision import ConvStem
from fedmoe.state import everything, load_state, other_than, split_state
from fedmoe.types import ClientInfo, MoEState, State

Anchoring = Literal["labels", "means", "random", "none"]
Gating = Literal["trained", "fitted", "random"]
Start = Literal["random", "encoder"]

Head = type[nn.Linear] | type[PrototypeHead] | type[DiscriminantHead]

SHAPE, NUM_CLASSES = (1, 28, 28), 10
ACTIVE = 10  # clients that take part in a round
GATE_HIDDEN = 64
HEAD_HIDDEN = 64  # of experts that are heads on the encoder's features
FULL_TEST = 1_000  # images of every label
ENCODER_IMAGES = 2_000  # at most; the images of FULL_TEST come after them
EXPERT_SHARE = 0.5  # of FedMoE's experts, that a client's memory holds


@dataclass(frozen=True, eq=False)
class Setup:
    """What all methods of one protocol and seed have in common."""

    name: str
    seed: int
    data: FederatedData
    common: State  # the common expert's parameters
    full_test: Examples
    schedule: Schedule
    experts: int  # of FedJETs, M; there are as many anchors
    k: int  # of them, that a client gets

    @property
    def plan(self) -> LocalPlan:
        """One epoch of SGD on the whole model, the same for all methods but for their rates."""
        return LocalPlan(
            (Phase(epochs=1),),
            lr=0.05,
            momentum=0.9,
            batch_size=20,
            clip=1.0,
            method=LocalMethod(full_test=self.full_test),
        )

    @property
    def plan_on_encoder(self) -> LocalPlan:
        """As `plan`, with an encoder that stays as it is, its features computed once."""
        return replace(self.plan, frozen=of_encoder, prepare=Features())


def heldout(
    seed: int = 0,
    rounds: int = 40,
    *,
    quality: Quality = "weak",
    experts: int = 10,
    k: int = 4,
    name: str | None = None,
) -> Methods:
    """30 clients train, 5 anchors and 5 others each round, and 10 come afterwards.

    Args:
        quality: of the common expert.
        experts: M of FedJETs. The first M clients share out the ten labels and have no others.
        k: K of FedJETs. The clients who come have 4 labels each.
    """
    setup = _setup(seed, rounds, quality, experts, k, name or f"heldout-{quality}")
    from_encoder = partial(small_cnn, seed, setup.common)
    proximal = replace(setup.plan, proximal=0.01)
    return _by_name(
        fedjets(setup, "fedjets"),
        fedjets(setup, "fedjets-from-encoder", start="encoder"),
        fedjets(setup, "fedjets-found", anchoring="means"),
        fedjets(setup, "fedjets-fitted", start="encoder", gating="fitted"),
        fedjets(
            setup,
            "fedjets-fitted-found",
            anchoring="means",
            start="encoder",
            gating="fitted",
        ),
        fedavg(setup, "fedavg"),
        replace(fedavg(setup, "fedavg-from-encoder"), factory=from_encoder),
        replace(fedavg(setup, "fedprox"), plan=proximal),
        replace(fedavg(setup, "fedprox-from-encoder"), factory=from_encoder, plan=proximal),
        linear_head(setup),
        summed_head(setup, "prototypes", PrototypeHead),
        summed_head(setup, "discriminant-head", DiscriminantHead),
        fedmix(setup),
        fedmoe(setup),
        fedjets(setup, "fedjets-random-gate", gating="random", control=True),
        summed_head(setup, "discriminant-chosen", DiscriminantHead, labels=setup.k, control=True),
    )


def ablations(
    seed: int = 0,
    rounds: int = 40,
    *,
    quality: Quality = "average",
    experts: int = 10,
    k: int = 4,
    name: str | None = None,
) -> Methods:
    """FedJETs with one thing changed at a time, on the same clients as `heldout`.

    K from 1 to M; anchors found, drawn, or none; three, five or all ten of a round's clients
    anchors; experts that start from the common expert, or are heads on the encoder's features; a
    gate that is fitted.
    Argmax against weighted use is measured in each. M is told by `experts`: other experts, other
    anchors, and so other data.
    """
    setup = _setup(seed, rounds, quality, experts, k, name or f"heldout-ablations-{quality}")
    ks = sorted({1, 2, 3, k, 6, experts} & set(range(1, experts + 1)))
    return _by_name(
        *(fedjets(setup, f"k-{some}", k=some) for some in ks),
        fedjets(setup, "anchors-found", anchoring="means"),
        fedjets(setup, "anchors-random", anchoring="random"),
        fedjets(setup, "no-anchors", anchoring="none"),
        fedjets(setup, "anchors-30-percent", anchors_per_round=3),
        fedjets(setup, "anchors-only", anchors_per_round=ACTIVE),
        fedjets(setup, "experts-from-encoder", start="encoder"),
        fedjets(setup, "experts-are-heads", reads="features"),
        fedjets(setup, "server-chooses", server_chooses=True),
        fedjets(setup, "fitted-gate", gating="fitted"),
        fedjets(setup, "random-gate", gating="random", control=True),
    )


def _by_name(*runs: Experiment) -> Methods:
    return {run.method: run for run in runs}


def _setup(
    seed: int, rounds: int, quality: Quality, experts: int, k: int, name: str
) -> Setup:
    data = heldout_data(seed, anchors=experts)
    aside = heldout_encoder_images(seed, ENCODER_IMAGES + FULL_TEST)
    return Setup(
        name,
        seed,
        data,
        common_expert(seed, quality),
        Examples(aside.x[-FULL_TEST:], aside.y[-FULL_TEST:]),
        Schedule(rounds, seed, clients_per_round=ACTIVE, evaluate_every=10),
        experts,
        k,
    )


def fedjets(
    setup: Setup,
    method: str,
    *,
    k: int | None = None,
    anchoring: Anchoring = "labels",
    anchors_per_round: int = 5,
    start: Start = "random",
    reads: Reads = "input",
    server_chooses: bool = False,
    gating: Gating = "trained",
    control: bool = False,
) -> Experiment:
    """FedJETs. Of a round's clients at most `anchors_per_round` are anchors, the rest are not."""
    anchors = _anchors(setup, anchoring)
    others = frozenset(c.id for c in setup.data.clients) - anchors.keys()
    num_anchors = min(anchors_per_round, len(anchors))
    quotas = ((frozenset(anchors), num_anchors), (others, ACTIVE - num_anchors))
    schedule = replace(setup.schedule, clients_per_round=None, quotas=quotas)
    plan = replace(
        setup.plan_on_encoder,
        phases=(Phase(everything if gating == "trained" else other_than(of_gate)),),
        method=FedJETsClient(gate_lr=0.02, full_test=setup.full_test),
    )
    strategy = FedJETs(
        anchors,
        k=setup.k if k is None else k,
        chooses="server" if server_chooses else "client",
        frozen=of_encoder,
        gate=Fitted(FEATURES, NUM_CLASSES) if gating == "fitted" else None,
    )
    factory = partial(
        members,
        setup.common,
        setup.experts,
        setup.seed,
        start=start,
        reads=reads,
        fitted=gating == "fitted",
    )
    return Experiment(
        setup.name,
        method,
        factory,
        strategy,
        plan,
        setup.data,
        setup.data.clients,
        schedule,
        control,
        setup.data.unseen,
    )


def fedavg(setup: Setup, method: str) -> Experiment:
    """FedAvg of one CNN; who comes later is served it as it is."""
    return Experiment(
        setup.name,
        method,
        partial(small_cnn, setup.seed),
        FedAvg(by_examples),
        setup.plan,
        setup.data,
        setup.data.clients,
        setup.schedule,
        unseen=setup.data.unseen,
    )


def linear_head(setup: Setup) -> Experiment:
    """FedAvg of a linear head on the frozen encoder."""
    return replace(
        fedavg(setup, "linear-head"),
        factory=partial(on_encoder, setup.common, setup.seed, nn.Linear),
        strategy=FedAvgOnFrozen(frozen=of_encoder),
        plan=setup.plan_on_encoder,
    )


def summed_head(
    setup: Setup, method: str, head: Head, labels: int | None = None, control: bool = False
) -> Experiment:
    """A head of sums on the frozen encoder; one round with everybody, and no other is needed."""
    summed = Prototypes(labels, full_test=setup.full_test)
    return replace(
        fedavg(setup, method),
        factory=partial(on_encoder, setup.common, setup.seed, head),
        strategy=prototypes(of_encoder),
        plan=replace(setup.plan_on_encoder, method=summed),
        schedule=replace(setup.schedule, clients_per_round=None),
        control=control,
    )


def fedmix(setup: Setup, num_members: int = 2) -> Experiment:
    """FedMix of two models, as in FedJETs' paper; who comes later has the gate of the start."""
    return replace(
        fedavg(setup, "fedmix"),
        factory=partial(mixture_of, small_cnn, num_members, NUM_CLASSES, SHAPE, setup.seed),
        strategy=FedAvg(by_mass),
        plan=replace(setup.plan, personal=of_gate),
    )


def fedmoe(setup: Setup) -> Experiment:
    """FedMoE; who comes later scouts with unlabelled data and gets a sub-MoE that fits."""
    factory = partial(expert_cnn, setup.seed)
    memory = memory_for(split_state(factory()), EXPERT_SHARE)

    def limited(clients: Sequence[ClientInfo]) -> tuple[ClientInfo, ...]:
        return tuple(replace(c, memory_bytes=memory) for c in clients)

    return replace(
        fedavg(setup, "fedmoe"),
        factory=factory,
        strategy=FedMoE(min_experts=2, seed=setup.seed),
        plan=replace(setup.plan, balance=0.01),
        clients=limited(setup.data.clients),
        unseen=limited(setup.data.unseen),
    )


def members(
    common: State,
    num_experts: int,
    seed: int,
    *,
    start: Start = "random",
    reads: Reads = "input",
    fitted: bool = False,
) -> Members:
    """FedJETs' model: CNNs of the common expert's kind, and a gate on its features.

    With `reads="features"` experts are small heads on the features, for which `start` has no say. A
    gate that is to be fitted is a `DiscriminantGate`.
    """

    def expert() -> nn.Module:
        return small_cnn() if reads == "input" else FFN(FEATURES, HEAD_HIDDEN, NUM_CLASSES)

    def gate() -> Ranking:
        if fitted:
            return DiscriminantGate(FEATURES, NUM_CLASSES, num_experts)
        return RankingGate(FEATURES, GATE_HIDDEN, num_experts)

    def build() -> Members:
        return Members(
            gate(),
            [expert() for _ in range(num_experts)],
            NUM_CLASSES,
            SHAPE,
            encoder=encoder_of(common),
            num_features=FEATURES,
            reads=reads,
        )

    model = seeded(build, seed)
    model.encoder = encoder_of(common)  # what was just drawn for it is lost
    if start == "encoder" and reads == "input":
        for member in model.mixture.experts.values():
            load_cnn(member.get_submodule("model"), common)
    return model


def on_encoder(common: State, seed: int, head: Head) -> Encoded:
    """A head on the common expert's features."""
    drawn = seeded(lambda: head(FEATURES, NUM_CLASSES), seed)
    return Encoded(encoder_of(common), FEATURES, drawn, SHAPE)


def expert_cnn(seed: int) -> StemAndHead:
    """`small_cnn` with 16 experts of width 16 in place of its hidden layer, for FedMoE."""

    def build() -> StemAndHead:
        head = moe_head(16 * CHANNELS[1], 16, NUM_CLASSES, 16, 2, "renormalise")
        return StemAndHead(ConvStem(CHANNELS), head)

    return seeded(build, seed)


def _anchors(setup: Setup, anchoring: Anchoring) -> Anchors:
    ids = [c.id for c in setup.data.clients]
    if anchoring == "labels":
        told = {c: setup.data.groups.get(c, "").split("+") for c in ids}
        labels = {c: frozenset(int(label) for label in own if label) for c, own in told.items()}
        return by_labels(labels, setup.experts)
    if anchoring == "means":
        encoder = encoder_of(setup.common).eval()
        with torch.no_grad():
            means = {c: encoder(setup.data.load(c).train.x).mean(0) for c in ids}
        return by_means(means, setup.experts)
    return at_random(ids, setup.experts, setup.seed) if anchoring == "random" else {}


@dataclass(frozen=True)
class Specialisation:
    """What every expert of a trained FedJETs can do, on images of every label."""

    accuracy_EC: tuple[tuple[float, ...], ...]  # of each expert on each label
    chosen_CE: tuple[tuple[float, ...], ...]  # of each label's images, share that each expert gets
    gate_hit: float  # share of images for which the gate's choice is the expert of least loss


def specialisation(experiment: Experiment, model: MoEState) -> Specialisation:
    """Every expert by itself, and where the gate of all of them sends each label.

    Raises:
        ValueError: the experiment has no images of every label to tell it by.
    """
    examples = experiment.plan.method.full_test
    if examples is None:
        raise ValueError("the plan's method must have a full_test to tell experts by, got None")
    net = experiment.factory()
    load_state(net, model)
    loss_NE, right_NE, choice_N = each_expert(net, examples, torch.device("cpu"))
    labels = range(experiment.data.num_classes)
    sent_NE = nn.functional.one_hot(choice_N, loss_NE.shape[1]).float()
    of_label = [examples.y == label for label in labels]
    right_CE = torch.stack([right_NE[own].float().mean(0) for own in of_label])
    return Specialisation(
        tuple(tuple(row_C) for row_C in right_CE.T.tolist()),
        tuple(tuple(sent_NE[own].mean(0).tolist()) for own in of_label),
        float((choice_N == loss_NE.argmin(1)).float().mean()),
    )
