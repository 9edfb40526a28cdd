from itertools import permutations

from fedmoe.checkpoint import content_hash
from fedmoe.federated.per_group import PerGroup
from fedmoe.types import ClientInfo, ExpertId
from tests.tiny import one_layer, update

STRATEGY = PerGroup({0: "a", 1: "b", 2: "a", 3: "b"})
CLIENTS = [ClientInfo(k) for k in range(4)]
MODEL = one_layer(0.0, 0.0, 0.0)


def updates():
    return [
        update(0, one_layer(1.0, 1.0, 8.0), [3, 0], num_examples=3),
        update(2, one_layer(5.0, 5.0, 9.0), [1, 0], num_examples=1),
        update(1, one_layer(7.0, 7.0, 0.5), [1, 1], num_examples=2),
    ]


def test_groups_share_nothing():
    state = STRATEGY.aggregate(STRATEGY.init(MODEL, CLIENTS), updates())
    a, b = state.models["a"], state.models["b"]
    assert a.shared["w"].item() == 2.0  # (3*1 + 1*5) / 4
    assert [a.experts[ExpertId(0, e)]["v"].item() for e in range(2)] == [2.0, 0.0]
    assert b.shared["w"].item() == 7.0
    assert [b.experts[ExpertId(0, e)]["v"].item() for e in range(2)] == [7.0, 0.5]


def test_a_client_is_given_its_groups_model():
    state = STRATEGY.aggregate(STRATEGY.init(MODEL, CLIENTS), updates())
    assignments = STRATEGY.assign(state, CLIENTS)
    assert {k: a.model.shared["w"].item() for k, a in assignments.items()} == {
        0: 2.0, 1: 7.0, 2: 2.0, 3: 7.0
    }
    assert all(a.round == 1 and len(a.sub_moe) == 2 for a in assignments.values())


def test_there_is_no_one_model():
    state = STRATEGY.init(MODEL, CLIENTS)
    assert STRATEGY.merged(state) is None
    assert STRATEGY.phase(state) == "train" and STRATEGY.changes(state) == ()


def test_the_order_of_updates_does_not_matter():
    start = STRATEGY.init(MODEL, CLIENTS)
    hashes = {content_hash(STRATEGY.aggregate(start, iter(p))) for p in permutations(updates())}
    assert len(hashes) == 1
