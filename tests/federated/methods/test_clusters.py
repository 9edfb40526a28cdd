from dataclasses import replace

import pytest
import torch
from torch import nn

from fedmoe.exchange.inprocess import in_process
from fedmoe.federated.average import average_by_expert
from fedmoe.federated.fedavg import FedAvg
from fedmoe.federated.local import LocalPlan, LocalTask, accuracy, work
from fedmoe.federated.methods.clusters import SCALE, BestMember, by_mass
from fedmoe.federated.rounds import Schedule, run_rounds
from fedmoe.nn.init import seeded
from fedmoe.nn.members import ChosenGate, Members
from fedmoe.rng import torch_generator
from fedmoe.state import split_state
from fedmoe.types import ActivationProfile, Assignment, ClientInfo, ClientUpdate, ExpertId
from tests.tiny import CLASSES, IN, client_data, one_layer, tiny

CPU = torch.device("cpu")
CLIENTS = [ClientInfo(k, num_examples=12) for k in range(4)]
PLAN = LocalPlan(lr=0.5, batch_size=4, method=BestMember())


def members(count=3, seed=0):
    def build():
        hidden = [nn.Sequential(nn.Linear(IN, 6), nn.Tanh(), nn.Linear(6, CLASSES))
                  for _ in range(count)]
        return Members(ChosenGate(count), hidden, CLASSES, (IN,))

    return seeded(build, seed)


START = split_state(members())
WHOLE = frozenset(START.experts)


def slow_losses(client):
    x, y = client_data(client).train
    models = [m.model for m in members().mixture.experts.values()]
    return [float(nn.functional.cross_entropy(m(x).detach(), y)) for m in models]


@pytest.mark.parametrize("client", range(4))
def test_a_client_takes_the_member_of_lowest_loss_and_sends_that_alone(client):
    losses = slow_losses(client)
    best = losses.index(min(losses))
    a = Assignment(0, START, WHOLE, evaluate=True)
    update, _ = work(client, a, members, client_data(client), PLAN, None, 0)
    assert update.model.experts.keys() == {ExpertId(0, best)}
    assert update.profile.count_LE.nonzero().tolist() == [[0, best]]
    only = members()
    only.mixture.gate.member = best
    test = accuracy(only, client_data(client).test, CPU)
    assert update.metrics["received_test"] == test


def test_of_equal_members_the_first_is_taken():
    model = members()
    for e in model.mixture.experts.values():
        e.load_state_dict(model.mixture.experts["0"].state_dict())
    task = LocalTask(0, model, client_data(0).train, PLAN, torch_generator(0), CPU, {}, {})
    BestMember().begin(task)
    assert model.mixture.gate.member == 0


def test_clients_of_opposite_kinds_end_up_with_different_members():
    exchange = in_process(members, client_data, PLAN, 0)
    chosen = {}

    def see(report):
        chosen.update({c: int(p.count_LE[0].argmax()) for c, p in report.profiles.items()})
        assert not report.failed and not report.refused

    strategy = FedAvg()
    state = strategy.init(START, CLIENTS)
    schedule = Schedule(8)
    end = run_rounds(
        strategy, state, CLIENTS, exchange, schedule,
        after_round=lambda r: see(r) if r.phase == "train" else None,
    )
    assert chosen[0] == chosen[2] != chosen[1] == chosen[3]
    assert end.round == 8


def test_a_model_without_members_is_refused():
    task = LocalTask(0, tiny(), client_data(0).train, PLAN, torch_generator(0), CPU, {}, {})
    with pytest.raises(ValueError, match="gate that is set from outside.* in a Tiny"):
        BestMember().begin(task)


def test_mass_weighs_by_hand():
    count = torch.tensor([[4, 4]])
    weight = torch.tensor([[3.5, 0.5]]).double()
    p = ActivationProfile(count, weight, weight, torch.tensor([4]))
    one = ClientUpdate(0, 4, one_layer(0.0, 1.0, 1.0), p, {})
    other = ClientUpdate(
        1, 4, one_layer(0.0, 8.0, 3.0), replace(p, weight_LE=weight.flip(1)), {}
    )
    assert [by_mass(one, ExpertId(0, e)) for e in range(2)] == [3.5 * SCALE, 0.5 * SCALE]
    model = average_by_expert(one_layer(0.0, 0.0, 0.0), [one, other], by_mass)
    values = [model.experts[ExpertId(0, e)]["v"].item() for e in range(2)]
    assert values == [1.875, 2.75]  # (3.5*1 + 0.5*8) / 4, (0.5*1 + 3.5*3) / 4


def test_the_gate_lets_everybody_in_until_one_is_chosen():
    gate, x = ChosenGate(3), torch.zeros(2, 5)
    present = torch.tensor([True, False, True])
    assert gate(x, present).weight_TE.tolist() == [[0.5, 0.0, 0.5]] * 2
    assert ChosenGate(3, 2)(x, present).weight_TE.tolist() == [[0.0, 0.0, 1.0]] * 2
    assert ChosenGate(3, 1)(x, present).weight_TE.tolist() == [[0.0] * 3] * 2
