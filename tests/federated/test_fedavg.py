import pytest
import torch

from fedmoe.federated.average import by_examples
from fedmoe.federated.fedavg import FedAvg, FixedSubMoE, choice_by_group, random_choice
from fedmoe.federated.select import memory_for
from fedmoe.state import split_state, state_hash
from fedmoe.types import ClientInfo, ExpertId, Job
from tests.tiny import one_layer, ragged, update

MODEL = one_layer(0.0, 0.0, 0.0, 0.0, 0.0)  # 4 bytes shared, 4 for each of 4 experts
CLIENTS = [ClientInfo(k) for k in range(3)]


def chosen(*numbers):
    return frozenset(ExpertId(0, e) for e in numbers)


def test_everybody_trains_the_whole_model_whatever_the_memory():
    clients = [ClientInfo(0, memory_bytes=1), ClientInfo(5)]
    strategy = FedAvg()
    state = strategy.init(MODEL, clients)
    assignments = strategy.assign(state, clients)
    assert assignments.keys() == {0, 5}
    for a in assignments.values():
        assert (a.round, a.job, a.validate, a.evaluate) == (0, Job.TRAIN, False, False)
        assert a.sub_moe == a.model.experts.keys() == chosen(0, 1, 2, 3)
        assert not a.absent_rows


def test_a_round_of_fedavg_worked_by_hand():
    strategy = FedAvg()
    state = strategy.aggregate(
        strategy.init(MODEL, CLIENTS),
        [
            update(0, one_layer(1.0, 1.0, 1.0, 1.0, 1.0), [3, 0, 1, 0], num_examples=3),
            update(1, one_layer(5.0, 5.0, 5.0, 5.0, 5.0), [1, 0, 0, 2], num_examples=1),
        ],
    )
    assert state.round == 1
    merged = strategy.merged(state)
    assert merged is state.model
    assert merged.shared["w"].item() == 2.0  # (3*1 + 1*5) / 4
    # (3*1 + 1*5) / 4, nobody, client 0 alone, client 1 alone
    assert [merged.experts[ExpertId(0, e)]["v"].item() for e in range(4)] == [2.0, 0.0, 1.0, 5.0]
    assert strategy.phase(state) == "train" and strategy.changes(state) == ()


def test_fedavg_may_weigh_experts_by_examples():
    strategy = FedAvg(weigh=by_examples)
    updates = [
        update(0, one_layer(1.0, 1.0), [1, 0, 0, 0], num_examples=3),
        update(1, one_layer(5.0, 5.0), [9, 0, 0, 0], num_examples=1),
    ]
    state = strategy.aggregate(strategy.init(MODEL, CLIENTS), updates)
    assert state.model.experts[ExpertId(0, 0)]["v"].item() == 2.0


def test_a_fixed_sub_moe_is_all_that_its_client_is_sent():
    strategy = FixedSubMoE(choice={0: chosen(1, 2), 1: chosen(0), 2: chosen(3)})
    state = strategy.init(MODEL, CLIENTS)
    assignments = strategy.assign(state, CLIENTS)
    assert {k: a.sub_moe for k, a in assignments.items()} == strategy.choice
    assert {k: frozenset(a.model.experts) for k, a in assignments.items()} == strategy.choice
    state = strategy.aggregate(state, [update(1, one_layer(2.0, 3.0), [7, 0, 0, 0])])
    assert state.model.experts[ExpertId(0, 0)]["v"].item() == 3.0
    assert strategy.assign(state, CLIENTS)[1].round == 1


def test_a_client_without_a_choice_is_named():
    strategy = FixedSubMoE(choice={0: chosen(1)})
    with pytest.raises(ValueError, match=r"client 1 has none \(2 in all\)"):
        strategy.assign(strategy.init(MODEL, CLIENTS), CLIENTS)


def test_a_random_choice_fills_each_clients_memory_and_depends_on_seed_and_client_alone():
    model = split_state(ragged())
    clients = [ClientInfo(k, memory_for(model, share)) for k, share in enumerate((0.5, 0.9, 1.0))]
    clients.append(ClientInfo(3))
    choice = random_choice(model, clients, seed=0)
    per_layer = {k: [sum(e.layer == i for e in s) for i in range(2)] for k, s in choice.items()}
    assert per_layer == {0: [1, 1], 1: [2, 2], 2: [2, 2], 3: [3, 2]}
    assert random_choice(model, clients[::-1], seed=0) == choice
    assert random_choice(model, clients[1:2], seed=0)[1] == choice[1]
    assert any(random_choice(model, clients, seed=s) != choice for s in range(1, 5))


def test_a_random_choice_has_no_favourites():
    clients = [ClientInfo(k, 12) for k in range(400)]  # two of four experts each
    choice = random_choice(MODEL, clients, seed=0)
    asked = torch.tensor([sum(ExpertId(0, e) in s for s in choice.values()) for e in range(4)])
    assert asked.sum() == 800
    assert asked.min() > 160 and asked.max() < 240  # 200 each, standard deviation 10


def test_a_random_choice_refuses_a_client_that_holds_no_expert():
    with pytest.raises(ValueError, match="memory_bytes must be at least 8"):
        random_choice(MODEL, [ClientInfo(0, 7)], seed=0)


def test_a_choice_by_group_divides_the_experts_among_groups():
    clients = [ClientInfo(k, 12) for k in range(4)]
    choice = choice_by_group(MODEL, clients, {0: "a", 1: "b", 2: "a", 3: "b"})
    assert choice == {0: chosen(0, 1), 1: chosen(2, 3), 2: chosen(0, 1), 3: chosen(2, 3)}


def test_with_room_for_more_a_client_gets_the_next_groups_experts_too():
    clients = [ClientInfo(0, 16), ClientInfo(1, 16), ClientInfo(2)]
    choice = choice_by_group(MODEL, clients, {0: "a", 1: "b", 2: "b"})
    assert choice == {0: chosen(0, 1, 2), 1: chosen(2, 3, 0), 2: chosen(0, 1, 2, 3)}


def test_with_less_room_a_groups_clients_share_out_its_experts():
    clients = [ClientInfo(k, 8) for k in range(4)]
    choice = choice_by_group(MODEL, clients, dict.fromkeys(range(3), "a") | {3: "b"})
    assert choice == {0: chosen(0), 1: chosen(1), 2: chosen(0), 3: chosen(2)}


def test_more_groups_than_experts_still_use_all_experts():
    clients = [ClientInfo(k, 8) for k in range(8)]
    choice = choice_by_group(MODEL, clients, {k: f"group {k}" for k in range(8)})
    assert [min(choice[k]).expert for k in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_aggregating_nothing_keeps_the_model():
    strategy = FedAvg()
    state = strategy.init(split_state(ragged()), CLIENTS)
    assert state_hash(strategy.aggregate(state, []).model) == state_hash(state.model)
