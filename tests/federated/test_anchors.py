import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmoe.federated.anchors import at_random, by_labels, by_means


def labels(**own):
    return {int(k[1:]): frozenset(v) for k, v in own.items()}


def test_anchors_by_labels_are_clients_that_share_none():
    known = labels(c0={0, 1, 2}, c1={0, 1}, c2={1, 2}, c3={2, 3}, c4={4})
    assert by_labels(known, 3) == {1: 0, 3: 1, 4: 2}  # the fewest labels, then the first client
    assert by_labels(known, 1) == {4: 0}


def test_anchors_by_labels_need_labels_and_enough_clients_that_share_none():
    with pytest.raises(ValueError, match="got none of client 1"):
        by_labels(labels(c0={0}, c1=set()), 1)
    with pytest.raises(ValueError, match="3 clients that share none, .* got 2"):
        by_labels(labels(c0={0}, c1={0, 1}, c2={1}), 3)


@given(st.integers(0, 10**6), st.integers(2, 5), st.integers(0, 12))
def test_anchors_by_means_are_the_clients_of_one_kind_however_many_mix_kinds(seed, kinds, mixed):
    g = torch.Generator().manual_seed(seed)
    kind_MF = torch.randn(kinds, kinds + 2, generator=g, dtype=torch.float64)
    share_KM = torch.rand(mixed, kinds, generator=g, dtype=torch.float64) + 0.05
    mixed_KF = share_KM / share_KM.sum(1, keepdim=True) @ kind_MF
    order = torch.randperm(kinds + mixed, generator=g).tolist()
    means = dict(zip(order, [*kind_MF, *mixed_KF], strict=True))
    anchors = by_means(means, kinds)
    assert anchors == {k: e for e, k in enumerate(sorted(order[:kinds]))}
    assert by_means(dict(reversed(means.items())), kinds) == anchors


def test_more_anchors_than_corners_are_the_farthest_from_those_worked_by_hand():
    means = {k: torch.tensor([x]) for k, x in enumerate([0.0, 1.0, 4.0, 10.0])}
    # 10 is farthest from the mean, 3.75, and 0 from 10; of those between 4 is farther from both.
    assert by_means(means, 3) == {0: 0, 2: 1, 3: 2}


def test_there_is_an_anchor_for_each_expert_even_where_clients_are_the_same():
    means = {k: torch.zeros(3) for k in range(4)}
    assert by_means(means, 4) == {0: 0, 1: 1, 2: 2, 3: 3}


def test_anchors_at_random_are_drawn_by_the_seed_alone():
    drawn = at_random(range(20), 5, seed=3)
    assert drawn == at_random(list(range(20))[::-1], 5, seed=3) != at_random(range(20), 5, seed=4)
    assert sorted(drawn.values()) == list(range(5)) and set(drawn) <= set(range(20))


@pytest.mark.parametrize(
    "find",
    [lambda m: by_means({0: torch.zeros(1)}, m), lambda m: at_random([0], m, 0)],
    ids=["by_means", "at_random"],
)
def test_there_are_no_more_anchors_than_clients(find):
    with pytest.raises(ValueError, match="at most the 1 clients, .* got 2"):
        find(2)
