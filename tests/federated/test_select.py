from itertools import chain, combinations, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmoe.federated.select import (
    expert_bytes_of,
    experts_that_fit,
    fits_whole,
    largest_coverage,
    memory_for,
)
from fedmoe.state import parameter_bytes, split_state
from fedmoe.types import ClientInfo, ExpertId, MoEState
from tests.tiny import one_layer, ragged, tiny

L, E, SIZE, SHARED = 2, 4, 10, 7
SIZES = {ExpertId(i, j): SIZE for i in range(L) for j in range(E)}


def shares(*rows):
    p_LE = torch.tensor(rows, dtype=torch.float64)
    return p_LE / p_LE.sum(-1, keepdim=True)


def numbers(sub_moe, layer=0):
    return sorted(e.expert for e in sub_moe if e.layer == layer)


def coverage(p_LE, sub_moe):
    return min(sum(float(p_LE[e]) for e in sub_moe if e.layer == i) for i in range(len(p_LE)))


def nonempty_subsets(layer, least):
    experts = [ExpertId(layer, j) for j in range(E)]
    return chain.from_iterable(combinations(experts, n) for n in range(least, E + 1))


def best_coverage(p_LE, limit, least):
    """By trying all sub-MoEs."""
    return max(
        coverage(p_LE, a + b)
        for a, b in product(nonempty_subsets(0, least), nonempty_subsets(1, least))
        if SHARED + SIZE * len(a + b) <= limit
    )


row = st.lists(st.integers(0, 6), min_size=E, max_size=E).filter(any)  # small, so with ties


@given(row, row, st.integers(2, 9), st.integers(0, SIZE - 1))
def test_coverage_is_the_largest_that_fits(a, b, count, spare):
    p_LE, limit = shares(a, b), SHARED + SIZE * count + spare
    sub_moe, theta = largest_coverage(p_LE, SIZES, limit, shared_bytes=SHARED)
    assert SHARED + SIZE * len(sub_moe) <= limit
    assert all(numbers(sub_moe, i) for i in range(L))
    assert coverage(p_LE, sub_moe) >= theta - 1e-9
    # At full coverage theta is 1, below that one of the sums.
    assert min(theta, coverage(p_LE, sub_moe)) == pytest.approx(best_coverage(p_LE, limit, 1))


@pytest.mark.parametrize("seed", range(60))
def test_coverage_is_the_largest_that_fits_for_shares_without_ties(seed):
    generator = torch.Generator().manual_seed(seed)
    p_LE = torch.rand(L, E, dtype=torch.float64, generator=generator) ** 3
    p_LE = p_LE / p_LE.sum(-1, keepdim=True)
    for least in (1, 2):
        for count in range(L * least, L * E + 1):
            sub_moe, theta = largest_coverage(
                p_LE, SIZES, SHARED + SIZE * count, shared_bytes=SHARED, min_experts=least
            )
            assert len(sub_moe) <= count
            assert all(len(numbers(sub_moe, i)) >= least for i in range(L))
            best = best_coverage(p_LE, SHARED + SIZE * count, least)
            assert coverage(p_LE, sub_moe) == pytest.approx(best, abs=1e-12)
            assert theta <= best + 1e-12


def test_a_concentrated_layer_keeps_few_experts_and_a_flat_one_many():
    p_LE = shares([97, 1, 1, 1], [1, 1, 1, 1])
    sub_moe, theta = largest_coverage(p_LE, SIZES, 4 * SIZE)
    assert numbers(sub_moe, 0) == [0] and numbers(sub_moe, 1) == [0, 1, 2]
    assert theta == pytest.approx(0.75)


def test_every_layer_takes_the_shortest_prefix_by_falling_share():
    p_LE = shares([1, 5, 3, 1], [4, 4, 1, 1])
    sub_moe, theta = largest_coverage(p_LE, SIZES, None, theta_cap=0.8)
    assert numbers(sub_moe, 0) == [1, 2] and numbers(sub_moe, 1) == [0, 1]
    assert theta == 0.8


def test_equal_shares_are_taken_in_order_of_number():
    sub_moe, _ = largest_coverage(shares([1, 1, 1, 1], [1, 2, 2, 1]), SIZES, 6 * SIZE)
    assert numbers(sub_moe, 0) == [0, 1, 2] and numbers(sub_moe, 1) == [0, 1, 2]


def test_experts_that_are_never_activated_are_left_out_even_where_memory_is_plenty():
    sub_moe, theta = largest_coverage(shares([1, 0, 1, 0], [0, 0, 0, 1]), SIZES, None)
    assert numbers(sub_moe, 0) == [0, 2] and numbers(sub_moe, 1) == [3]
    assert theta == 1.0


def test_full_coverage_is_reached_in_spite_of_rounding():
    p_LE = torch.tensor([[0.1] * 10 + [0.0]], dtype=torch.float64)
    assert sum([0.1] * 10) < 1
    sub_moe, theta = largest_coverage(p_LE, {ExpertId(0, e): 1 for e in range(11)}, None)
    assert numbers(sub_moe) == list(range(10)) and theta == 1.0


@pytest.mark.parametrize("limit", [5 * SIZE, None])
def test_a_layer_without_any_activation_gets_its_minimum_and_hinders_no_other(limit):
    p_LE = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.4, 0.3, 0.2, 0.1]]).double()
    sub_moe, theta = largest_coverage(p_LE, SIZES, limit)
    assert numbers(sub_moe, 0) == [0] and numbers(sub_moe, 1) == [0, 1, 2, 3]
    assert theta == 1.0


def test_the_minimum_is_met_even_where_one_expert_covers_all():
    sub_moe, _ = largest_coverage(shares([0, 0, 1, 0], [1, 1, 1, 1]), SIZES, None, min_experts=2)
    assert numbers(sub_moe, 0) == [0, 2] and numbers(sub_moe, 1) == [0, 1, 2, 3]


def test_layers_may_differ_in_their_number_of_experts():
    sizes = {ExpertId(0, 0): 1, ExpertId(0, 1): 1, ExpertId(0, 2): 1, ExpertId(1, 0): 5}
    p_LE = torch.tensor([[0.2, 0.5, 0.3], [1.0, 0.0, 0.0]]).double()
    sub_moe, theta = largest_coverage(p_LE, sizes, 7)
    assert sub_moe == {ExpertId(0, 1), ExpertId(0, 2), ExpertId(1, 0)}
    assert theta == pytest.approx(0.8)


def test_a_cap_of_0_asks_for_the_minimum_alone():
    sub_moe, theta = largest_coverage(shares([1, 2, 1, 1], [1, 1, 1, 3]), SIZES, None, theta_cap=0)
    assert sub_moe == {ExpertId(0, 1), ExpertId(1, 3)} and theta == 0.0


@pytest.mark.parametrize("least, needed", [(1, SHARED + 2 * SIZE), (3, SHARED + 6 * SIZE)])
def test_too_small_a_memory_is_refused_with_the_numbers(least, needed):
    p_LE = shares([1, 1, 1, 1], [1, 1, 1, 1])
    say = {"shared_bytes": SHARED, "min_experts": least}
    assert len(largest_coverage(p_LE, SIZES, needed, **say)[0]) == 2 * least
    with pytest.raises(ValueError, match=f"at least {needed} .* {least} expert.* got {needed - 1}"):
        largest_coverage(p_LE, SIZES, needed - 1, **say)


@pytest.mark.parametrize(
    "say, message",
    [
        ({"min_experts": 0}, "min_experts must be at least 1 per layer, got 0"),
        ({"min_experts": 5}, "min_experts must be at most the 4 experts of layer 0, got 5"),
        ({"theta_cap": 1.5}, "theta_cap must be between 0 and 1, got 1.5"),
        ({"theta_cap": -0.1}, "theta_cap must be between 0 and 1, got -0.1"),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused(say, message):
    with pytest.raises(ValueError, match=message):
        largest_coverage(shares([1, 1, 1, 1], [1, 1, 1, 1]), SIZES, None, **say)


def test_experts_that_fit_worked_by_hand():
    model = one_layer(1.0, 1.0, 2.0, 3.0)  # 4 bytes shared, 4 for each of 3 experts
    assert [experts_that_fit(model, b) for b in (8, 11, 12, 16, 99, None)] == [1, 1, 2, 3, 3, 3]
    with pytest.raises(ValueError, match="memory_bytes must be at least 8 .* got 7"):
        experts_that_fit(model, 7)


def test_experts_that_fit_take_one_of_every_layer_at_a_time():
    model = split_state(ragged())
    sizes = expert_bytes_of(model)
    pair = sizes[ExpertId(0, 0)] + sizes[ExpertId(1, 0)]
    shared = parameter_bytes(model.shared)
    assert experts_that_fit(model, shared + 2 * pair - 1) == 1
    assert experts_that_fit(model, shared + 2 * pair) == 2
    assert experts_that_fit(model, None) == 3  # the larger layer


def test_a_model_without_experts_needs_no_memory_for_any():
    dense = MoEState({"w": torch.zeros(3)}, {})
    assert experts_that_fit(dense, 1) == experts_that_fit(dense, None) == 0
    assert largest_coverage(torch.zeros(0, 0), {}, None) == (frozenset(), 1.0)


def test_memory_for_a_share_worked_by_hand():
    model = one_layer(1.0, 1.0, 2.0, 3.0, 4.0)
    assert [memory_for(model, s) for s in (0.25, 0.5, 0.6, 1.0)] == [8, 12, 14, 20]  # 4 + share*16
    assert memory_for(split_state(tiny()), 1.0) == sum(
        p.numel() * 4 for p in tiny().parameters()
    )


@pytest.mark.parametrize("share", [0.0, -0.5, 1.01])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match=f"share must be above 0 .* got {share}"):
        memory_for(one_layer(1.0, 1.0), share)


def test_the_whole_model_fits_just_where_its_last_byte_does():
    model = one_layer(1.0, 1.0, 2.0)
    assert fits_whole(ClientInfo(0), model) and fits_whole(ClientInfo(0, 12), model)
    assert not fits_whole(ClientInfo(0, 11), model)
