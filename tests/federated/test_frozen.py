from dataclasses import replace

import torch
from torch import nn

from fedmoe.data.examples import Examples
from fedmoe.exchange.inprocess import in_process
from fedmoe.exchange.personal import PersonalStore
from fedmoe.federated.features import Features
from fedmoe.federated.fedavg import FedAvg
from fedmoe.federated.frozen import FedAvgOnFrozen, sent_once
from fedmoe.federated.local import LocalPlan
from fedmoe.federated.prototypes import Prototypes, prototypes
from fedmoe.federated.rounds import Schedule, run_rounds
from fedmoe.nn.encoder import Encoded, PrototypeHead, of_encoder
from fedmoe.nn.init import seeded
from fedmoe.state import load_state, parameter_bytes, split_state
from fedmoe.types import Assignment, ClientInfo, MoEState
from tests.tiny import CLASSES, IN, client_data, number

F = 4
CLIENTS = tuple(ClientInfo(k, num_examples=10 + k) for k in range(3))


def load(client):
    return client_data(client, num_train=10 + client)


def on_encoder(head):
    def factory():
        return seeded(lambda: Encoded(nn.Linear(IN, F), F, head(), (IN,)), 0)

    return factory


def linear():
    return on_encoder(lambda: nn.Linear(F, CLASSES))


def run(factory, strategy, plan, folder, rounds=3, clients=CLIENTS, schedule=None):
    reports = []
    exchange = in_process(factory, load, plan, 0, store=PersonalStore(folder))
    start = strategy.init(split_state(factory()), clients)
    end = run_rounds(strategy, start, clients, exchange, schedule or Schedule(rounds),
                     after_round=reports.append)
    assert not any(r.failed or r.refused for r in reports), reports[0].failed
    return end, reports


def test_frozen_parameters_go_apart_or_not_at_all():
    model = MoEState({"encoder.w": number(1.0), "head.w": number(2.0)}, {})
    whole = Assignment(0, model, frozenset())
    first, later = (sent_once(whole, of_encoder, has) for has in (False, True))
    assert set(first.once) == {"encoder.w"} and not later.once
    assert set(first.model.shared) == set(later.model.shared) == {"head.w"}


def test_the_encoder_goes_to_each_client_once_and_never_moves(tmp_path):
    factory, plan = linear(), LocalPlan(lr=0.1, frozen=of_encoder)
    end, reports = run(factory, FedAvgOnFrozen(frozen=of_encoder), plan, tmp_path,
                       schedule=Schedule(4, clients_per_round=1))
    start = split_state(factory())
    size = parameter_bytes({n: t for n, t in start.shared.items() if of_encoder(n)})
    had: set[int] = set()
    for r in reports:
        assert r.bytes_once == size * len(r.held.keys() - had)
        had |= r.held.keys()
    for name, value in end.model.shared.items():
        assert torch.equal(value, start.shared[name]) == of_encoder(name)


def test_it_is_fedavg_of_what_is_left(tmp_path):
    """Sending the encoder each time, and computing features each time, comes to the same."""
    factory, plan = linear(), LocalPlan(lr=0.1, frozen=of_encoder)
    plain, _ = run(factory, FedAvg(), plan, tmp_path / "a")
    once, _ = run(factory, FedAvgOnFrozen(frozen=of_encoder), plan, tmp_path / "b")
    cached, _ = run(factory, FedAvgOnFrozen(frozen=of_encoder),
                    replace(plan, prepare=Features()), tmp_path / "c")
    for name, value in plain.model.shared.items():
        torch.testing.assert_close(once.model.shared[name], value, rtol=0, atol=0)
        torch.testing.assert_close(cached.model.shared[name], value)


def test_prototypes_are_those_of_all_clients_examples_together(tmp_path):
    factory = on_encoder(lambda: PrototypeHead(F, CLASSES))
    plan = LocalPlan(frozen=of_encoder, prepare=Features(), method=Prototypes())
    end, reports = run(factory, prototypes(of_encoder), plan, tmp_path, rounds=1)
    model = factory()
    load_state(model, end.model)
    x, y = (torch.cat(t) for t in zip(*(load(c.id).train for c in CLIENTS), strict=True))
    feature_NF = model.encoder(x)
    for label in range(CLASSES):
        mean_F = model.head.sum_CF[label] / model.head.count_C[label]
        torch.testing.assert_close(mean_F, feature_NF[y == label].mean(0))
    again, _ = run(factory, prototypes(of_encoder), plan, tmp_path / "again", rounds=2)
    for name, value in end.model.shared.items():
        assert torch.equal(value, again.model.shared[name])  # a second round adds nothing
    assert all(0 <= m["received_test"] <= 1 for m in reports[-1].metrics.values())


def test_a_client_with_few_labels_is_told_apart_among_its_likeliest(tmp_path):
    """Logits are what the encoder gives: the two labels of the largest sums are 1 and 2."""

    class AsItIs(nn.Module):
        def forward(self, x_NC):
            return x_NC

    p_NC = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.1, 0.1, 0.8], [0.0, 0.6, 0.4]])
    examples = Examples(p_NC.log(), torch.tensor([1, 1, 2, 2]))
    plain, chosen = (
        Prototypes(labels).serve(AsItIs(), examples, torch.device("cpu"))["served_test"]
        for labels in (None, 2)
    )
    assert (plain, chosen) == (0.5, 0.75)  # the first is no longer taken for 0
    assert Prototypes(9).serve(AsItIs(), examples, torch.device("cpu"))["served_test"] == plain
