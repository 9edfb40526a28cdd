"""Methods of a protocol must differ in nothing but the method, and all must work."""

from collections import OrderedDict
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from fedmoe.data.examples import Examples
from fedmoe.data.protocols import domains as domains_data
from fedmoe.experiments import fashion
from fedmoe.experiments.definition import definition_of
from fedmoe.experiments.experiment import with_budgets
from fedmoe.experiments.memory import peak_bytes
from fedmoe.experiments.methods import (
    OtherModels,
    all_methods,
    clusters_of,
    core_methods,
    mixture_of,
)
from fedmoe.experiments.run import Spec, run_experiment
from fedmoe.federated.fedavg import FedAvg
from fedmoe.federated.fedmoe import FedMoE
from fedmoe.federated.local import LocalPlan, Phase
from fedmoe.federated.rounds import Schedule
from fedmoe.federated.select import experts_that_fit
from fedmoe.nn.classifier import dense_classifier
from fedmoe.nn.extractors import vowel_extractors
from fedmoe.nn.init import seeded
from fedmoe.nn.vision import fashion_cnn
from fedmoe.report.log import read_run
from fedmoe.state import (
    moe_layers,
    named_by_role,
    nothing,
    other_than,
    parameter_bytes,
    split_state,
    state_hash,
    take_names,
)
from fedmoe.types import Assignment, ExpertId
from fedmoe.wire.codecs import Int8
from fedmoe.wire.messages import message_bytes
from fedmoe.wire.packing import Codecs
from tests.tiny import CLASSES, IN, D, Tiny, federated_data, tiny


class Normed(Tiny):
    def __init__(self):
        super().__init__(4, 1)
        self.norm = nn.BatchNorm1d(D)

    def forward(self, x_NI):
        return self.head(self.norm(self.stem(x_NI)))


def normed():
    return seeded(Normed, 0)


def stem():
    return nn.Sequential(nn.Linear(IN, D), nn.Tanh())


def normed_stem():
    return nn.Sequential(OrderedDict(up=nn.Linear(IN, D), norm=nn.BatchNorm1d(D)))


MEMBER = partial(dense_classifier, stem, D, 3, CLASSES)
NORMED_MEMBER = partial(dense_classifier, normed_stem, D, 3, CLASSES)


def summed():
    """As `tiny`, with outputs added up."""
    model = tiny()
    for _, moe in moe_layers(model):
        moe.gate.gate_mass = "sum"
    return model


OTHERS = OtherModels(
    clusters=partial(clusters_of, MEMBER, 3, CLASSES, (IN,)),
    mixture=partial(mixture_of, MEMBER, 3, CLASSES, (IN,)),
    extractors=partial(vowel_extractors, features=IN, num_features=D, num_classes=CLASSES),
    normed=normed,
    normed_clusters=partial(clusters_of, NORMED_MEMBER, 3, CLASSES, (IN,)),
)


def tiny_methods(others=OTHERS, rounds=2, lr=0.1):
    """All methods on four clients with a few points each; two sizes of device."""
    plan = LocalPlan((Phase(epochs=1),), lr=lr, batch_size=5, balance=0.01, clip=1.0)
    schedule = Schedule(rounds, seed=5)
    fedmoe = FedMoE(smooth_over=1, patience=1)
    return all_methods(
        "tiny", federated_data(), tiny, plan, schedule, (0.5, 1.0), fedmoe,
        summed=summed if others is OTHERS else None, others=others,
    )  # fmt: skip


ALL = tiny_methods()
PLAN = LocalPlan(lr=0.1)
CODED_METHODS = {"fedmoe-int8", "fedavg-int8"}
NORMED = {"fedavg-norm", "fedbn", "fedmoe-norm", "ifca-norm"}
OWN_MODEL = {*NORMED, "ifca", "fedmix", "pfedmoe"}
BOTH_MODELS = {"fedmoe-mean", "fedavg-sum", "local-sum"}  # where there are two of one start
SUMMED = {
    "fedmoe", "random", "chosen-by-group", "frequency-pruning", "fedmoe-int8", "fedavg-sum",
    "local-sum",
}  # fmt: skip


@pytest.fixture(scope="module")
def data():
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (400, 28, 28), generator=g, dtype=torch.uint8)
    source = Examples(images, torch.arange(400) % 10)
    return domains_data(1, train=6, validation=2, test=2, num_clients=16, source=source)


@pytest.fixture(scope="module")
def runs(data):
    factory = partial(fashion_cnn, num_experts=8, hidden=4, seed=2)
    plan, schedule = LocalPlan(lr=0.1), Schedule(2, 1)
    return core_methods(
        "p", data, factory, plan, schedule, (0.25, 1.0), FedMoE(), lr_of={"local": 0.5}
    )


def test_all_methods_have_the_same_clients_start_and_rounds(runs):
    for methods in (runs, {m: e for m, e in ALL.items() if m not in OWN_MODEL}):
        assert len({state_hash(split_state(r.factory())) for r in methods.values()}) == 1
        assert len({r.clients for r in methods.values()}) == 1
    for methods in (runs, ALL):
        assert len({r.schedule for r in methods.values()}) == 1
        assert len({r.data.partition_hash for r in methods.values()}) == 1
        assert len({tuple(c.id for c in r.clients) for r in methods.values()}) == 1
        assert all(r.method == m for m, r in methods.items())


def test_only_who_knows_the_groups_is_a_control(runs):
    for methods in (runs, ALL):
        controls = {m for m, r in methods.items() if r.control}
        assert controls == {"chosen-by-group", "fedavg-per-group"}


def test_a_methods_own_learning_rate_is_its_own(runs):
    assert {m for m, r in runs.items() if r.plan.lr != 0.1} == {"local"}
    plan = LocalPlan(lr=0.1)
    every = {m: 0.01 * (i + 1) for i, m in enumerate(ALL) if m not in CODED_METHODS}
    made = all_methods(
        "tiny", federated_data(), tiny, plan, Schedule(1), (0.5,), FedMoE(),
        summed=summed, lr_of=every, others=OTHERS,
    )
    assert {m: r.plan.lr for m, r in made.items()} == {
        **every, "fedmoe-int8": every["fedmoe"], "fedavg-int8": every["fedavg"]
    }  # fmt: skip


def test_fedprox_differs_from_fedavg_in_the_pull_alone(runs):
    plan = runs["fedprox"].plan
    assert plan.proximal > 0
    assert replace(plan, proximal=0.0) == runs["fedavg"].plan


def changes_by_codecs(methods):
    """What is set otherwise in a method whose messages are coded, but for its name."""
    found = set()
    for coded in CODED_METHODS:
        plain, spec = methods[coded.removesuffix("-int8")], Spec("p", "", 0, 2)
        made = definition_of(spec, replace(plain, method=coded)).settings
        found |= set(definition_of(spec, methods[coded]).differs_from(made))
        assert methods[coded].clients == plain.clients
    return {name.split(".")[0] for name in found}


def test_a_coded_method_differs_in_its_codecs_alone(data):
    schedule = Schedule(2, 1)
    plan = LocalPlan(lr=0.1)
    on_images = fashion._on_images("p", data, plan, schedule, (0.25,))
    skewed = fashion._on_skewed(data, schedule)
    for methods in (ALL, on_images, skewed):
        assert changes_by_codecs(methods) == {"down", "up"}
    assert skewed["fedmoe-int8"].plan.personal is not nothing
    assert skewed["fedavg-int8"].plan.personal is nothing
    assert ALL["fedmoe-int8"].down == ALL["fedavg-int8"].down == Codecs(Int8(), Int8(levels=47))
    assert ALL["fedmoe-int8"].up == ALL["fedavg-int8"].up == Codecs(Int8(), Int8(levels=31))


def test_fedmoe_with_a_normalisation_of_its_own_is_fedbn_with_fedmoes_strategy(data):
    schedule = Schedule(2, 1)
    plain = fashion._on_images("p", data, LocalPlan(lr=0.1), schedule, (0.25,))
    spec = Spec("p", "", 0, 2)
    made = definition_of(spec, replace(plain["fedbn"], method="fedmoe-norm")).settings
    changed = definition_of(spec, plain["fedmoe-norm"]).differs_from(made)
    assert {name.split(".")[0] for name in changed} == {"strategy"}
    assert plain["fedmoe-norm"].strategy == plain["fedmoe-mean"].strategy
    keeps = fashion._on_skewed(data, schedule)["fedmoe-norm"].plan.personal
    assert keeps("stem.norm1.weight") and keeps("experts.0.1.down.weight")
    assert not keeps("stem.conv1.weight") and not keeps("experts.0.1.up.weight")


def test_sub_moes_add_up_what_the_others_average(data):
    for methods in (ALL, fashion._on_images("p", data, PLAN, Schedule(2, 1), (0.25,))):
        gates = {m: moe.gate for m, e in methods.items() for _, moe in moe_layers(e.factory())}
        assert {m for m, g in gates.items() if getattr(g, "gate_mass", "") == "sum"} == SUMMED


def test_fedmoe_that_sums_holds_as_many_experts_as_a_token_uses_and_fits_where_the_mean_does(data):
    methods = fashion._on_images("p", data, PLAN, Schedule(2, 1), (0.25,))
    mean, own = methods["fedmoe-mean"], methods["fedmoe"]
    assert own.strategy == replace(mean.strategy, min_experts=4)
    assert (own.plan, own.clients) == (mean.plan, mean.clients)
    model = own.factory()
    [(_, moe)] = moe_layers(model)
    assert (moe.gate.k, moe.gate.gate_mass) == (4, "sum")
    assert state_hash(split_state(model)) == state_hash(split_state(mean.factory()))
    assert {experts_that_fit(split_state(model), c.memory_bytes) for c in own.clients} == {4}
    assert methods["frequency-pruning"].strategy.min_experts == 4
    for method in ("fedavg", "local"):
        alike = methods[f"{method}-sum"]
        assert alike.factory is own.factory and alike.strategy == FedAvg()
        assert alike.plan == methods[method].plan
    skewed = fashion._on_skewed(data, Schedule(2, 1))
    for method in ("fedmoe", "fedmoe-mean"):
        kept = skewed[method].plan.personal
        assert kept("experts.0.1.down.weight") and not kept("experts.0.1.up.weight")


def test_without_a_model_that_sums_all_train_the_same():
    methods = tiny_methods(OtherModels())
    assert len({e.factory for m, e in methods.items()}) == 1
    assert not methods.keys() & BOTH_MODELS


def test_clusters_with_normalisation_average_it_as_all_else():
    plain, normed = ALL["ifca"], ALL["ifca-norm"]
    assert normed.plan == plain.plan and normed.clients == plain.clients
    assert normed.plan.personal is nothing
    names = split_state(normed.factory()).experts[ExpertId(0, 2)].keys()
    assert "model.stem.norm.running_mean" in names


def test_budgets_go_round_within_each_group(data, runs):
    model = split_state(runs["fedmoe"].factory())
    clients = with_budgets(data, model, (0.25, 0.5))
    fit = {c.id: experts_that_fit(model, c.memory_bytes) for c in clients}
    # Client c is in domain c % 4; each domain's first and third have a quarter of 8 experts.
    assert [fit[c] for c in range(16)] == [2] * 4 + [4] * 4 + [2] * 4 + [4] * 4


def test_random_and_known_choices_fill_each_clients_memory(runs):
    model = split_state(runs["random"].factory())
    for method in ("random", "chosen-by-group"):
        for c in runs[method].clients:
            count = experts_that_fit(model, c.memory_bytes)
            assert len(runs[method].strategy.choice[c.id]) == count in (2, 8)


def test_a_share_of_nothing_is_refused(data, runs):
    with pytest.raises(ValueError, match="share must be above 0 and at most 1 .* got 0"):
        with_budgets(data, split_state(runs["fedmoe"].factory()), (0.0,))


def test_the_core_methods_come_first_and_are_the_same_among_all(runs):
    core = [m for m in ALL if m in runs]
    assert list(ALL)[: len(core)] == core == list(runs)


def test_a_method_without_its_model_is_left_out():
    assert ALL.keys() - tiny_methods(OtherModels()).keys() == OWN_MODEL | BOTH_MODELS
    assert "ifca" in tiny_methods(OtherModels(clusters=OTHERS.clusters))


def test_fedrep_trains_its_head_and_then_its_body_and_never_both():
    head, body = ALL["fedrep"].plan.phases
    names = [n for n, _ in named_by_role(tiny())]
    assert [head.trains(n) for n in names] == [not body.trains(n) for n in names]
    assert {n for n in names if head.trains(n)} == {n for n in names if ".down." in n}
    assert ALL["fedper"].plan.personal is head.trains


def test_models_of_clusters_start_apart_and_from_the_seed_alone():
    for make in (clusters_of, mixture_of):
        a, b, c = (split_state(make(MEMBER, 3, CLASSES, (IN,), seed)) for seed in (1, 1, 2))
        assert state_hash(a) == state_hash(b) != state_hash(c)
        assert len({str(own["model.stem.0.weight"]) for own in a.experts.values()}) == 3


def test_fedmix_keeps_its_gate_and_only_that():
    e = ALL["fedmix"]
    kept = take_names(split_state(e.factory()), e.plan.personal)
    assert kept.shared.keys() == {
        f"mixture.gate.{layer}.{kind}" for layer in ("up", "down") for kind in ("weight", "bias")
    }
    assert not kept.experts


# All of them run


def test_a_client_of_ifca_needs_memory_to_train_one_model_and_one_of_fedmix_for_all():
    wide = partial(dense_classifier, stem, D, 2000, CLASSES)
    needed = {}
    for method, make in (("ifca", clusters_of), ("fedmix", mixture_of)):
        e = replace(ALL[method], factory=partial(make, wide, 3, CLASSES, (IN,)))
        model = split_state(e.factory())
        needed[method] = peak_bytes(e, frozenset(model.experts))
    one = parameter_bytes(model.experts[ExpertId(0, 0)])
    assert needed["fedmix"] - needed["ifca"] > 1.5 * one  # the gradients of the two others


def rounds_of(folder):
    return [replace(r, seconds=0.0) for r in read_run(folder).rounds]


@pytest.mark.slow
@pytest.mark.parametrize("method", ALL)
def test_every_method_gives_the_same_bits_again_and_after_a_kill(method, tmp_path):
    class Killed(BaseException):
        pass

    def kill(record):
        raise Killed

    one = run_experiment(ALL[method], tmp_path / "one")
    assert run_experiment(tiny_methods()[method], tmp_path / "two") == one
    with pytest.raises(Killed):
        run_experiment(ALL[method], tmp_path / "killed", on_round=kill)
    assert len(read_run(tmp_path / "killed").rounds) == 1
    assert run_experiment(ALL[method], tmp_path / "killed", resume=True) == one
    logs = [rounds_of(tmp_path / name) for name in ("one", "two", "killed")]
    assert logs[0] == logs[1] == logs[2]
    for r in logs[0]:
        assert not r.failed and not r.refused
        assert r.bytes_down > 0 and r.bytes_up > 0
    *_, last = logs[0]
    assert last.phase == "final" and len(last.accuracy) == 4


@pytest.mark.slow
def test_bytes_are_what_each_method_sends(tmp_path):
    def traffic(method):
        folder = tmp_path / method
        run_experiment(ALL[method].shortened(1), folder)
        first = read_run(folder).rounds[0]
        return first.bytes_down / 4, first.bytes_up / 4

    model = split_state(tiny())
    whole = frozenset(model.experts)
    plain = message_bytes(Assignment(0, model, whole))
    for method in ("fedavg", "ditto", "apfl", "flame", "fedalign"):
        assert traffic(method)[0] == plain
    controls = ALL["scaffold"].strategy.init(model, ALL["scaffold"].clients).control
    assert traffic("scaffold")[0] == message_bytes(Assignment(0, model, whole, extra=controls))
    without_head = take_names(model, other_than(ALL["fedper"].plan.personal))
    for method in ("fedper", "fedrep"):
        assert traffic(method)[0] == message_bytes(Assignment(0, without_head, whole))
    members = split_state(ALL["ifca"].factory())
    down, up = traffic("ifca")
    assert down == message_bytes(Assignment(0, members, frozenset(members.experts)))
    one = parameter_bytes(members.experts[ExpertId(0, 0)])
    assert traffic("fedmix")[1] - up >= 2 * one  # IFCA sends one of three back, FedMix all
