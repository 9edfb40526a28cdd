from dataclasses import replace

import pytest

from fedmoe.federated.average import by_examples
from fedmoe.federated.fedavg import FedAvg
from fedmoe.federated.methods.slices import FedRolex, HeteroFL, window
from fedmoe.federated.select import memory_for
from fedmoe.state import split_state, state_hash
from fedmoe.types import ClientInfo, ExpertId
from tests.tiny import one_layer, ragged, tiny, update

MODEL = split_state(tiny())
SHARES = (0.25, 0.5, 0.75, 1.0)
CLIENTS = [ClientInfo(k, memory_for(MODEL, share)) for k, share in enumerate(SHARES)]


def numbers(assignments):
    return [sorted(e.expert for e in assignments[k].sub_moe) for k in sorted(assignments)]


def test_small_models_are_nested_in_large_ones_in_every_round():
    strategy = HeteroFL()
    state = strategy.init(MODEL, CLIENTS)
    for round in range(3):
        parts = strategy.assign(replace(state, round=round), CLIENTS)
        assert numbers(parts) == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]
        for a in parts.values():
            assert a.model.experts.keys() == a.sub_moe and a.round == round


def test_windows_roll_on_by_one_expert_a_round_and_go_round():
    strategy = FedRolex()
    state = strategy.init(MODEL, CLIENTS)
    two = [numbers(strategy.assign(replace(state, round=r), CLIENTS))[1] for r in range(5)]
    assert two == [[0, 1], [1, 2], [2, 3], [0, 3], [0, 1]]


@pytest.mark.parametrize("make", [tiny, ragged])
def test_over_the_rounds_the_smallest_device_trains_every_expert(make):
    model = split_state(make())
    small = ClientInfo(0, memory_for(model, 0.55))  # one expert per layer, or two of four
    strategy = FedRolex()
    state = strategy.init(model, [small])
    seen = set()
    for round in range(4):
        part = strategy.assign(replace(state, round=round), [small])[0].sub_moe
        assert {e.layer for e in part} == {e.layer for e in model.experts}
        assert len(part) < len(model.experts)
        seen |= part
    assert seen == set(model.experts)


def test_a_device_that_holds_all_is_a_client_of_fedavg():
    free = [ClientInfo(k) for k in range(2)]
    for strategy in (HeteroFL(), FedRolex()):
        mine = strategy.assign(replace(strategy.init(MODEL, free), round=3), free)
        plain = FedAvg().assign(replace(FedAvg().init(MODEL, free), round=3), free)
        assert mine.keys() == plain.keys()
        for k, a in mine.items():
            assert a.sub_moe == plain[k].sub_moe
            assert state_hash(a.model) == state_hash(plain[k].model)


def test_a_slice_is_averaged_over_those_who_held_it():
    strategy = HeteroFL(by_examples)
    state = strategy.init(one_layer(0.0, 0.0, 0.0), [ClientInfo(0), ClientInfo(1)])
    small = update(0, one_layer(1.0, 1.0), [1, 0], num_examples=3)
    large = update(1, one_layer(5.0, 5.0, 9.0), [1, 1], num_examples=1)
    end = strategy.aggregate(state, [small, large])
    values = [end.model.experts[ExpertId(0, e)]["v"].item() for e in range(2)]
    assert values == [2.0, 9.0]  # (3*1 + 1*5) / 4, and the large client's alone


def test_layers_of_different_size_each_have_a_window_of_their_own():
    model = split_state(ragged())  # three experts, and two
    part = window(model, ClientInfo(0, memory_for(model, 0.55)), start=2)
    assert part == {ExpertId(0, 2), ExpertId(1, 0)}


def test_a_device_without_room_for_one_expert_is_refused():
    with pytest.raises(ValueError, match="memory_bytes must be at least"):
        HeteroFL().assign(HeteroFL().init(MODEL, CLIENTS), [ClientInfo(0, 10)])
