from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmoe.federated.average import (
    GRID_BITS,
    LIMIT,
    UPDATE_LIMIT,
    Mean,
    average_by_expert,
    by_examples,
    by_tokens,
    reach_of,
    tokens_of,
)
from fedmoe.nn.vision import small_vit
from fedmoe.state import ROW, split_state, state_hash
from fedmoe.types import ClientUpdate, ExpertId, MoEState
from tests.tiny import number, one_layer, profile, ragged, tiny, update

E0, E1 = ExpertId(0, 0), ExpertId(0, 1)


def test_a_mean_worked_by_hand():
    mean = Mean()
    mean.add({"v": number(1.0)}, 3)
    mean.add({"v": number(5.0)}, 1)
    assert mean.result({"v": number(9.0)})["v"].tolist() == [2.0]  # (3*1 + 1*5) / 4


def test_experts_weigh_by_tokens_and_the_rest_by_examples():
    model = one_layer(0.0, 0.0, 0.0)
    updates = [
        update(0, one_layer(1.0, 1.0, 1.0), [3, 1], num_examples=1),
        update(1, one_layer(5.0, 5.0, 5.0), [1, 3], num_examples=4),
    ]
    merged = average_by_expert(model, updates)
    assert merged.shared["w"].tolist() == [pytest.approx(4.2)]  # (1*1 + 4*5) / 5
    assert merged.experts[E0]["v"].tolist() == [2.0]  # (3*1 + 1*5) / 4
    assert merged.experts[E1]["v"].tolist() == [4.0]  # (1*1 + 3*5) / 4


def test_by_examples_everybody_who_used_an_expert_counts_with_all_examples():
    model = one_layer(0.0, 0.0, 7.0)
    updates = [
        update(0, one_layer(0.0, 1.0, 1.0), [1, 0], num_examples=3),
        update(1, one_layer(0.0, 5.0, 2.0), [9, 0], num_examples=1),
    ]
    merged = average_by_expert(model, updates, by_examples)
    assert merged.experts[E0]["v"].tolist() == [2.0]  # (3*1 + 1*5) / 4
    assert merged.experts[E1]["v"].tolist() == [7.0]  # nobody used it


def odd_state(seed, shape=(7,)):
    """Values that no grid holds: of every magnitude, with zeros of both signs."""
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(shape, generator=generator)
    value = value * 10 ** (torch.rand(shape, generator=generator) * 20 - 18)
    value.view(-1)[0] = -0.0
    return {"v": value, "h": value.bfloat16(), "d": value.double() / 3}


def bits(t):
    return t.contiguous().view(torch.uint8).tolist()


@pytest.mark.parametrize("weight", [1, 7, 12_345])
def test_one_holder_is_copied_bit_for_bit(weight):
    state, old = odd_state(1), {n: torch.zeros_like(t) for n, t in odd_state(1).items()}
    mean = Mean()
    mean.add(state, weight)
    assert {n: bits(t) for n, t in mean.result(old).items()} == {
        n: bits(t) for n, t in state.items()
    }


def test_what_nobody_sent_or_used_stays_bit_for_bit():
    old = MoEState(odd_state(1), {E0: odd_state(2), E1: odd_state(3), ExpertId(1, 0): odd_state(4)})
    before = state_hash(old)
    assert state_hash(average_by_expert(old, [])) == before
    scouts = [update(k, MoEState({}, {}), [5, 5]) for k in range(3)]
    assert state_hash(average_by_expert(old, scouts)) == before
    # E1 is held by two clients whose data never went there, and nobody holds the other layer's.
    moved = MoEState(old.shared, {E0: odd_state(5), E1: odd_state(6)})
    merged = average_by_expert(old, [update(k, moved, [4, 0]) for k in range(2)])
    for e in (E1, ExpertId(1, 0)):
        assert {n: bits(t) for n, t in merged.experts[e].items()} == {
            n: bits(t) for n, t in old.experts[e].items()
        }
    assert bits(merged.experts[E0]["v"]) != bits(old.experts[E0]["v"])


def random_updates(num, seed):
    """Of clients that hold different sub-MoEs of a ragged model and sent tokens to some of them."""
    generator = torch.Generator().manual_seed(seed)
    base = split_state(ragged())
    updates = []
    for client in range(num):
        count_LE = torch.randint(0, 40, (2, 3), generator=generator)
        held = [e for e in sorted(base.experts) if torch.rand(1, generator=generator) < 0.6]

        def moved(part):
            return {
                n: t + torch.randn(t.shape, generator=generator) * 0.1
                if t.is_floating_point()
                else t + 5
                for n, t in part.items()
            }

        model = MoEState(moved(base.shared), {e: moved(base.experts[e]) for e in held})
        for e in base.experts:
            if e not in held:
                count_LE[e.layer, e.expert] = 0
        count_LE[1, 2] = 0  # the second layer has two experts
        size = int(torch.randint(1, 300, (1,), generator=generator))
        updates.append(ClientUpdate(client, size, model, profile(*count_LE.tolist()), {}))
    return updates


@given(st.data(), st.integers(0, 5), st.integers(1, 6), st.sampled_from([by_tokens, by_examples]))
def test_the_order_of_updates_does_not_change_a_bit(data, seed, num, weigh):
    base, updates = split_state(ragged()), random_updates(num, seed)
    shuffled = data.draw(st.permutations(updates))
    assert state_hash(average_by_expert(base, shuffled, weigh)) == state_hash(
        average_by_expert(base, updates, weigh)
    )


def slow_mean(pairs):
    total = sum(weight for _, weight in pairs)
    return sum(value.double() * weight for value, weight in pairs) / total


@pytest.mark.parametrize("weigh", [by_tokens, by_examples])
@pytest.mark.parametrize("seed", range(4))
def test_an_average_equals_its_definition(seed, weigh):
    base, updates = split_state(ragged()), random_updates(5, seed)
    merged = average_by_expert(base, updates, weigh)
    for name, value in merged.shared.items():
        wanted = slow_mean([(u.model.shared[name], u.num_examples) for u in updates])
        wanted = wanted if value.is_floating_point() else wanted.round()
        torch.testing.assert_close(value.double(), wanted, rtol=0, atol=1e-6)
    for e, state in merged.experts.items():
        holders = [u for u in updates if e in u.model.experts and tokens_of(u.profile, e)]
        for name, value in state.items():
            if not holders:
                assert torch.equal(value, base.experts[e][name])
                continue
            pairs = [(u.model.experts[e][name], weigh(u, e)) for u in holders]
            torch.testing.assert_close(value.double(), slow_mean(pairs), rtol=0, atol=1e-6)


@given(st.lists(st.tuples(st.floats(-4, 4), st.integers(1, 500)), min_size=2, max_size=9))
def test_a_mean_is_off_by_at_most_half_a_step_of_the_grid_over_the_mean_weight(pairs):
    mean = Mean()
    for value, weight in pairs:
        mean.add({"v": number(value, torch.float64)}, weight)
    total = sum(weight for _, weight in pairs)
    exact = sum(Fraction(value) * weight for value, weight in pairs) / total
    error = abs(mean.result({"v": number(0.0, torch.float64)})["v"].item() - float(exact))
    assert error <= 2.0 ** -(GRID_BITS + 1) * len(pairs) / total + 1e-15


@pytest.mark.parametrize("make", [ragged, tiny, small_vit], ids=lambda m: m.__name__)
def test_merging_unchanged_parts_of_all_clients_changes_nothing(make):
    base = split_state(make())
    layers = 1 + max(e.layer for e in base.experts)
    width = 1 + max(e.expert for e in base.experts)
    updates = []
    for client in range(5):
        held = [e for e in base.experts if (e.expert + e.layer + client) % 3]
        count = [[17 * client + e + 1 for e in range(width)] for _ in range(layers)]
        part = base.only(frozenset(held))
        updates.append(ClientUpdate(client, 31 * client + 10, part, profile(*count), {}))
    merged = average_by_expert(base, updates)
    for name, value in base.shared.items():
        torch.testing.assert_close(merged.shared[name], value, rtol=0, atol=1e-7)
    for e, state in base.experts.items():
        for name, value in state.items():
            torch.testing.assert_close(merged.experts[e][name], value, rtol=0, atol=1e-7)


@given(st.integers(0, 10**6))
def test_a_row_moves_with_the_same_coefficients_as_its_expert(seed):
    # Put the same number into an expert and its row: it must come out the same.
    generator = torch.Generator().manual_seed(seed)
    base = MoEState({}, {e: {"v": number(0.0), ROW + "w": number(0.0)} for e in (E0, E1)})
    updates = []
    for client in range(4):
        values = torch.randn(2, generator=generator)
        count = torch.randint(0, 3, (2,), generator=generator).tolist()
        experts = {
            e: {"v": v.reshape(1), ROW + "w": v.reshape(1).clone()}
            for e, v in zip((E0, E1), values, strict=True)
        }
        updates.append(update(client, MoEState({}, experts), count))
    for state in average_by_expert(base, updates).experts.values():
        assert bits(state["v"]) == bits(state[ROW + "w"])


def test_a_name_that_only_some_send_is_averaged_over_those():
    mean = Mean()
    mean.add({"a": number(1.0), "b": number(1.0)}, 3)
    mean.add({"a": number(5.0)}, 1)
    mean.add({"c": number(8.0)}, 5)
    result = mean.result({n: number(0.0) for n in "abcd"})
    assert {n: t.item() for n, t in result.items()} == {"a": 2.0, "b": 1.0, "c": 8.0, "d": 0.0}


def test_whole_numbers_are_averaged_to_the_nearest_and_keep_their_dtype():
    mean = Mean()
    for value, weight in ((10, 1), (11, 2)):
        state = {
            "steps": torch.tensor(value),
            "small": torch.tensor([value], dtype=torch.int16),
            "mask": torch.tensor([value > 10, False]),
        }
        mean.add(state, weight)
    old = {"steps": torch.tensor(0), "small": number(0, torch.int16), "mask": torch.ones(2).bool()}
    result = mean.result(old)
    assert result["steps"].item() == 11 and result["steps"].dtype == torch.int64  # 32 / 3
    assert result["small"].tolist() == [11] and result["small"].dtype == torch.int16
    assert result["mask"].tolist() == [True, False]  # 2 / 3 of the weight says yes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_an_update_is_not_changed_by_being_folded(dtype):
    states = [{"v": torch.tensor([value, 0.5], dtype=dtype)} for value in (1.0, 2.0, 4.0)]
    mean = Mean()
    for state in states:
        mean.add(state, 2)
    assert [s["v"].tolist() for s in states] == [[1.0, 0.5], [2.0, 0.5], [4.0, 0.5]]
    result = mean.result({"v": torch.zeros(2, dtype=dtype)})["v"]
    assert result.dtype == dtype
    torch.testing.assert_close(result, torch.tensor([7 / 3, 0.5], dtype=dtype))


def test_results_are_made_only_when_asked_for_and_again_the_same():
    mean = Mean()
    mean.add({"v": number(1.0)}, 1)
    mean.add({"v": number(2.0)}, 1)
    assert mean.result({"v": number(0.0)})["v"].tolist() == [1.5]
    mean.add({"v": number(6.0)}, 1)
    assert mean.result({"v": number(0.0)})["v"].tolist() == [3.0]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 2.0 * LIMIT, -LIMIT / 2])
def test_a_value_that_could_overflow_is_refused_and_nothing_of_it_folded(value):
    mean = Mean()
    mean.add({"a": number(1.0), "b": number(1.0)}, 1)
    with pytest.raises(ValueError, match="'b': weight times value must stay below 17179869184"):
        mean.add({"a": number(5.0), "b": number(value)}, 2)
    mean.add({"a": number(3.0), "b": number(3.0)}, 1)
    result = mean.result({"a": number(0.0), "b": number(0.0)})
    assert result["a"].tolist() == result["b"].tolist() == [2.0]


def test_the_bound_is_on_the_sum_and_holds_whatever_is_left_out_in_between():
    mean, most = Mean(), LIMIT / 4
    for _ in range(3):
        mean.add({"v": number(most)}, 1)
        mean.add({"other": number(1.0)}, 1)
    with pytest.raises(ValueError, match="'v'"):
        mean.add({"v": number(most)}, 1)
    # Below the bound the sum on the grid is exact: nothing has wrapped around.
    assert mean.result({"v": number(0.0), "other": number(0.0)})["v"].tolist() == [most]
    assert LIMIT * 2.0**GRID_BITS == 2.0**62


def test_a_thousand_updates_of_the_largest_size_can_be_summed():
    mean, most = Mean(), torch.nextafter(number(UPDATE_LIMIT), number(0.0))
    for _ in range(1000):
        mean.add({"v": most}, 1)
    assert torch.equal(mean.result({"v": number(0.0)})["v"], most)


def test_the_least_whole_number_has_a_magnitude_too():
    least = torch.iinfo(torch.int64).min
    assert reach_of(torch.tensor([least]), 2) == 2.0 ** (64 - GRID_BITS)
    assert reach_of(torch.tensor([False, True]), 3) == 3.0 / 2**GRID_BITS
    assert reach_of(torch.tensor([-3.0, 2.0]), 2) == 6.0
    assert reach_of(torch.zeros(0), 2) == 0.0
    with pytest.raises(ValueError, match="must stay below"):
        Mean().add({"v": torch.tensor([least])}, 1)


def test_a_counter_may_grow_far_beyond_what_a_parameter_may():
    steps, mean = torch.tensor(10**12), Mean()
    assert reach_of(steps, 1000) < UPDATE_LIMIT
    for more, weight in ((1, 999), (2, 1000), (4, 1)):
        mean.add({"steps": steps + more}, weight)
    # (1*999 + 2*1000 + 4) / 2000 = 1.5015
    assert mean.result({"steps": steps})["steps"].item() == 10**12 + 2


@pytest.mark.parametrize("weight", [0, -1])
def test_a_weight_below_1_is_refused(weight):
    with pytest.raises(ValueError, match=f"weight must be at least 1, got {weight}"):
        Mean().add({"v": number(1.0)}, weight)


def test_a_profile_that_does_not_reach_an_expert_says_0_tokens():
    p = profile([1, 2], [3, 4])
    assert [tokens_of(p, ExpertId(*e)) for e in [(1, 1), (0, 1), (2, 0), (0, 2)]] == [4, 2, 0, 0]


def test_the_model_is_not_changed_by_averaging():
    base = split_state(ragged())
    before = state_hash(base)
    average_by_expert(base, random_updates(4, seed=0))
    assert state_hash(base) == before
