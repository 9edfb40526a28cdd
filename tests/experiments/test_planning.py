from dataclasses import replace

import pytest
import torch
from torch import nn

from fedmoe.experiments.memory import peak_bytes
from fedmoe.experiments.planning import plan_clients
from fedmoe.federated.fedjets import FedJETs, FedJETsClient
from fedmoe.federated.frozen import FedAvgOnFrozen
from fedmoe.federated.local import LocalPlan
from fedmoe.federated.methods.apfl import APFL
from fedmoe.federated.methods.ditto import Ditto
from fedmoe.federated.methods.scaffold import Controlled, Scaffold
from fedmoe.nn.gates.ranking import RankingGate
from fedmoe.nn.init import seeded
from fedmoe.nn.members import Members
from fedmoe.state import parameter_bytes, split_state
from fedmoe.types import Assignment, ExpertId
from fedmoe.wire.messages import encode_assignment
from tests.experiments.tiny import tiny
from tests.tiny import CLASSES, IN, D, experiment


def mixture():
    """Three linear models under a gate that ranks them."""

    def build():
        models = [nn.Sequential(nn.Linear(IN, D), nn.Linear(D, CLASSES)) for _ in range(3)]
        return Members(RankingGate(IN, 4, 3), models, CLASSES, (IN,))

    return seeded(build, 0)


def some(numbers):
    return frozenset(ExpertId(0, n) for n in numbers)


def test_a_plan_tells_each_client_what_its_memory_holds(tiny_target):
    plans = plan_clients(tiny()["fedmoe"])
    # Budgets of 50 and 100 % go round within each group: clients 0 and 1, then 2 and 3.
    assert [p.experts_per_layer for p in plans] == [2, 2, 4, 4]
    assert [p.group for p in plans] == ["upright", "turned"] * 2
    assert all(p.seconds > 0 and p.training_bytes > p.parameter_bytes for p in plans)


def test_planned_bytes_are_those_of_the_message(tiny_target):
    experiment = tiny()["fedmoe"]
    model, part = split_state(experiment.factory()), some([0, 1])
    message = encode_assignment(Assignment(0, model.only(part), part))
    assert plan_clients(experiment)[0].bytes_down == len(message)


def test_training_alone_sends_no_parameters(tiny_target):
    plans = plan_clients(tiny()["local"])
    model = split_state(tiny()["local"].factory())
    assert max(p.bytes_down for p in plans) < parameter_bytes(model.shared) + 1000
    assert plans[0].bytes_down < plan_clients(tiny()["fedavg"])[0].bytes_down


def test_a_budget_below_one_expert_is_refused_by_number(tiny_target):
    experiment = tiny()["fedmoe"]
    starved = replace(experiment, clients=(replace(experiment.clients[0], memory_bytes=10),))
    with pytest.raises(ValueError, match="memory_bytes must be at least .*, got 10"):
        plan_clients(starved)


def test_more_experts_need_more_memory(tiny_target):
    experiment = tiny()["fedmoe"]
    few, many = (peak_bytes(experiment, some(range(n)), torch.device("cpu")) for n in (1, 4))
    state = split_state(experiment.factory())
    assert few < many
    # At least the parameters themselves and as much again for gradients.
    used = parameter_bytes(state.shared) + sum(parameter_bytes(s) for s in state.experts.values())
    assert many > 1.5 * used


def whole_of(experiment):
    return split_state(experiment.factory())


def bytes_of(model):
    return parameter_bytes(model.shared) + sum(parameter_bytes(s) for s in model.experts.values())


@pytest.mark.parametrize(
    "method, models",
    [
        (Ditto(), 2),  # the second model, and what it began as, stored
        (APFL(), 2),
        (Controlled(), 2),  # its own controls, and the server's
    ],
)
def test_what_a_method_keeps_beside_the_model_takes_memory(tiny_target, method, models):
    plain = tiny()["fedavg"]
    kept = replace(plain, plan=replace(plain.plan, method=method))
    if isinstance(method, Controlled):
        kept = replace(kept, strategy=Scaffold())
    model = whole_of(plain)
    peaks = [peak_bytes(e, frozenset(model.experts)) for e in (plain, kept)]
    assert peaks[1] - peaks[0] >= models * bytes_of(model)


def test_scaffolds_controls_are_counted_both_ways(tiny_target):
    plain = tiny()["fedavg"]
    scaffold = replace(
        plain, strategy=Scaffold(), plan=replace(plain.plan, method=Controlled())
    )
    [without], [with_them] = (
        plan_clients(replace(e, clients=e.clients[:1])) for e in (plain, scaffold)
    )
    model = whole_of(plain)
    # A number for each parameter, and names of them.
    assert with_them.bytes_down - without.bytes_down >= bytes_of(model)
    assert with_them.bytes_up - without.bytes_up >= 0.5 * bytes_of(model)  # of those that moved
    state = scaffold.strategy.init(model, scaffold.clients)
    sent = scaffold.strategy.assign(state, scaffold.clients)[0]
    assert with_them.bytes_down == len(encode_assignment(sent))


def test_frozen_parameters_are_no_part_of_a_rounds_bytes(tiny_target):
    plain = tiny()["fedavg"]
    stem = lambda name: name.startswith("0.")  # noqa: E731
    frozen = replace(
        plain, strategy=FedAvgOnFrozen(frozen=stem), plan=replace(plain.plan, frozen=stem)
    )
    model = whole_of(plain)
    for ours, all_of_it in zip(plan_clients(frozen), plan_clients(plain), strict=True):
        for way in ("bytes_down", "bytes_up"):
            assert getattr(all_of_it, way) - getattr(ours, way) >= parameter_bytes(model.shared)


def test_a_client_that_is_asked_is_planned_with_what_it_will_be_given(tmp_path):
    strategy = FedJETs({0: 1}, k=2)
    plan = LocalPlan(lr=0.1, batch_size=5, method=FedJETsClient())
    e = experiment(strategy=strategy, factory=mixture, plan=plan)
    plans = plan_clients(e)
    assert [p.experts_held for p in plans] == [1, 2, 2, 2]  # the anchor has its own alone
    assert [p.experts_per_layer for p in plans] == [3] * 4
