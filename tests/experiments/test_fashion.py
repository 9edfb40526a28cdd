"""Methods of a protocol must differ in nothing but the method."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from fedmoe.data.examples import Examples
from fedmoe.data.protocols import domains as domains_data
from fedmoe.experiments.experiment import with_budgets
from fedmoe.experiments.fashion import methods
from fedmoe.federated.fedmoe import FedMoE
from fedmoe.federated.local import LocalPlan
from fedmoe.federated.rounds import Schedule
from fedmoe.federated.select import experts_that_fit
from fedmoe.nn.vision import fashion_cnn
from fedmoe.state import split_state, state_hash


@pytest.fixture(scope="module")
def data():
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (400, 28, 28), generator=g, dtype=torch.uint8)
    source = Examples(images, torch.arange(400) % 10)
    return domains_data(1, train=6, validation=2, test=2, num_clients=16, source=source)


@pytest.fixture(scope="module")
def runs(data):
    factory = partial(fashion_cnn, num_experts=8, hidden=4, seed=2)
    schedule = Schedule(2, 1)
    plan = LocalPlan(lr=0.1)
    return methods("p", data, factory, plan, schedule, (0.25, 1.0), FedMoE(), lr_of={"local": 0.5})


def test_all_methods_have_the_same_clients_start_and_rounds(runs):
    assert len({state_hash(split_state(r.factory())) for r in runs.values()}) == 1
    assert len({r.clients for r in runs.values()}) == 1
    assert len({r.schedule for r in runs.values()}) == 1
    assert len({r.data.partition_hash for r in runs.values()}) == 1


def test_only_who_knows_the_groups_is_a_control(runs):
    assert {m for m, r in runs.items() if r.control} == {"chosen-by-group", "fedavg-per-group"}


def test_a_methods_own_learning_rate_is_its_own(runs):
    assert {m for m, r in runs.items() if r.plan.lr != 0.1} == {"local"}


def test_fedprox_differs_from_fedavg_in_the_pull_alone(runs):
    plan = runs["fedprox"].plan
    assert plan.proximal > 0
    assert replace(plan, proximal=0.0) == runs["fedavg"].plan


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
