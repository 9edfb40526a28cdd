from dataclasses import replace

import pytest
import torch

from fedmoe.experiments.memory import peak_bytes
from fedmoe.experiments.planning import plan_clients
from fedmoe.state import parameter_bytes, split_state
from fedmoe.types import Assignment, ExpertId
from fedmoe.wire.messages import encode_assignment
from tests.experiments.tiny import tiny


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
