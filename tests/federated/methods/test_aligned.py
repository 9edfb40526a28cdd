from itertools import permutations

import pytest
import torch

from fedmoe.checkpoint import content_hash
from fedmoe.federated.fedavg import FedAvg
from fedmoe.federated.local import LocalPlan, work
from fedmoe.federated.methods.aligned import Aligned, Copy, agreeing
from fedmoe.state import split_state
from fedmoe.types import ClientInfo, ExpertId, MoEState
from tests.tiny import client_data, tiny, update

CLIENTS = [ClientInfo(k) for k in range(4)]
E = ExpertId(0, 0)


def state(*v):
    return MoEState({"w": torch.tensor([float(v[0])])}, {E: {"v": torch.tensor(v).float()}})


SENT = state(1.0, 1.0)


def after(updates, least=0.0):
    strategy = Aligned(least=least)
    return strategy.aggregate(strategy.init(SENT, CLIENTS), updates).model


def test_copies_that_went_opposite_ways_are_not_averaged():
    there = update(0, state(2.0, 1.0), [3], num_examples=1)  # moved by (1, 0)
    back = update(1, state(0.0, 1.0), [1], num_examples=3)  # moved by (-1, 0)
    model = after([there, back])
    assert model.experts[E]["v"].tolist() == [2.0, 1.0]  # the copy of more tokens
    assert model.shared["w"].item() == 0.5  # (1*2 + 3*0) / 4: shared parameters as ever


def test_copies_that_went_the_same_way_are_averaged():
    updates = [
        update(0, state(2.0, 1.0), [3]),
        update(1, state(4.0, 1.1), [1]),  # much further, a little aside
        update(2, state(0.5, 1.0), [2]),  # the other way
    ]
    v = after(updates, least=0.9).experts[E]["v"]
    assert v.tolist() == pytest.approx([2.5, 1.025])  # (3*2 + 1*4) / 4, (3*1 + 1*1.1) / 4


def test_the_centre_is_the_copy_with_which_most_tokens_agree():
    # Of a fan of three, the outer two do not agree with each other; the middle one with both.
    copies = [
        Copy(0, 4, {"v": torch.tensor([2.0, 1.0])}),  # 0 degrees
        Copy(1, 1, {"v": torch.tensor([2.0, 2.0])}),  # 45 degrees
        Copy(2, 4, {"v": torch.tensor([1.0, 2.0])}),  # 90 degrees
        Copy(3, 8, {"v": torch.tensor([0.0, 0.0])}),  # the other way
    ]
    group = agreeing(SENT.experts[E], copies, least=0.6)
    assert [copy.client for copy in group] == [0, 1, 2]  # 4 + 1 + 4 tokens against 8


def test_at_minus_one_everybody_agrees_and_it_is_fedavg():
    model = split_state(tiny())
    updates = [
        work(k, a, tiny, client_data(k), LocalPlan(lr=0.1), None, 0)[0]
        for k, a in FedAvg().assign(FedAvg().init(model, CLIENTS), CLIENTS).items()
    ]
    strategies = (Aligned(least=-1), FedAvg())
    ends = [s.aggregate(s.init(model, CLIENTS), iter(updates)) for s in strategies]
    assert content_hash(ends[0]) == content_hash(ends[1])
    other = Aligned(least=0.999).aggregate(Aligned().init(model, CLIENTS), iter(updates))
    assert content_hash(other) != content_hash(ends[1])


def test_the_order_of_updates_does_not_matter():
    updates = [
        update(0, state(2.0, 1.0), [2]),
        update(1, state(0.0, 1.0), [2]),  # as many tokens, the other way: the lower client wins
        update(2, state(1.0, 1.0), [1]),  # has not moved
    ]
    strategy = Aligned(least=0.1)
    start = strategy.init(SENT, CLIENTS)
    ends = [strategy.aggregate(start, iter(p)) for p in permutations(updates)]
    assert len({content_hash(end) for end in ends}) == 1
    assert ends[0].model.experts[E]["v"].tolist() == [2.0, 1.0]


def test_an_expert_that_nobody_used_keeps_its_parameters():
    assert after([update(0, state(2.0, 3.0), [0])]).experts[E]["v"].tolist() == [1.0, 1.0]


def test_a_threshold_that_is_no_cosine_is_refused():
    with pytest.raises(ValueError, match="least must be a cosine between -1 and 1, got 2"):
        Aligned(least=2.0)
