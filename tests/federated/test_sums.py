"""Sums are exact and the same bits in any order and grouping, with the kernel and without it."""

import pickle
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmoe.federated import sums
from fedmoe.federated.sums import (
    GRID_BITS,
    KERNEL_LIMIT,
    LIMIT,
    PIECE,
    UPDATE_LIMIT,
    Mean,
    Sums,
    reach_of,
)
from fedmoe.native import fold
from fedmoe.types import Term
from tests.federated.test_average import bits, odd_state
from tests.tiny import number


@pytest.fixture(autouse=True, scope="module", params=["kernel", "torch"])
def way(request):
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(fold, "available", lambda: False)
        elif not fold.available():
            pytest.skip("no compiler here")
        yield request.param


def test_a_mean_worked_by_hand():
    mean = Mean()
    mean.add({"v": number(1.0)}, 3)
    mean.add({"v": number(5.0)}, 1)
    assert mean.result({"v": number(9.0)})["v"].tolist() == [2.0]  # (3*1 + 1*5) / 4


@pytest.mark.parametrize("weight", [1, 7, 12_345])
def test_one_holder_is_copied_bit_for_bit(weight):
    state, old = odd_state(1), {n: torch.zeros_like(t) for n, t in odd_state(1).items()}
    mean = Mean()
    mean.add(state, weight)
    assert {n: bits(t) for n, t in mean.result(old).items()} == {
        n: bits(t) for n, t in state.items()
    }


@given(st.lists(st.tuples(st.floats(-4, 4), st.integers(1, 500)), min_size=2, max_size=9))
def test_a_mean_is_off_by_at_most_half_a_step_of_the_grid_over_the_mean_weight(pairs):
    mean = Mean()
    for value, weight in pairs:
        mean.add({"v": number(value, torch.float64)}, weight)
    total = sum(weight for _, weight in pairs)
    exact = sum(Fraction(value) * weight for value, weight in pairs) / total
    error = abs(mean.result({"v": number(0.0, torch.float64)})["v"].item() - float(exact))
    assert error <= 2.0 ** -(GRID_BITS + 1) * len(pairs) / total + 1e-15


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


def defined(pairs, dtype):
    """The mean by its definition, of values of one dtype."""
    if len(pairs) == 1:
        return pairs[0][0]
    steps = 2.0**GRID_BITS if dtype.is_floating_point else 1.0
    total = sum((v.double() * (w * steps)).round().long() for v, w in pairs)
    mean = total.double() / sum(w for _, w in pairs) / steps
    return (mean if dtype.is_floating_point else mean.round()).to(dtype)


DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool]


def drawn(seed, num, count, dtype, weights=(1, 7, 200, 2**20, 2**29 + 1)):
    """States of one parameter and their weights; sizes of every order, those on a tie too."""
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for _ in range(num):
        value = torch.randn(count, generator=generator, dtype=torch.float64)
        value *= 2.0 ** torch.randint(-40, 3, (count,), generator=generator)
        ties = torch.randint(-5, 5, (count,), generator=generator) * 2.0 ** -(GRID_BITS + 1)
        value = torch.where(torch.rand(count, generator=generator) < 0.2, ties, value)
        weight = weights[int(torch.randint(len(weights), (1,), generator=generator))]
        high = 4 / (1 + weight // 2**27)
        value = value.clamp(-high, high) if dtype.is_floating_point else value * 100
        pairs.append((value.to(dtype), weight))
    return pairs


def folded(pairs, old):
    mean = Mean()
    for value, weight in pairs:
        mean.add({"v": value}, weight)
    return mean.result({"v": old})["v"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 31, 128, 300, PIECE + 5])
def test_a_mean_has_the_bits_of_its_definition(dtype, count):
    for num in (1, 2, 3, 6):
        pairs = drawn(num + count, num, count, dtype)
        result = folded(pairs, torch.zeros(count, dtype=dtype))
        assert result.dtype is dtype and bits(result) == bits(defined(pairs, dtype))


@given(st.integers(0, 10**6), st.integers(2, 7), st.sampled_from(DTYPES), st.data())
def test_any_order_and_any_grouping_give_the_same_bits(seed, num, dtype, data):
    pairs = data.draw(st.permutations(drawn(seed, num, 70, dtype)))
    places = data.draw(st.lists(st.integers(0, 2), min_size=num, max_size=num))
    means = [Mean(), Mean(), Mean()]
    for place, (value, weight) in zip(places, pairs, strict=True):
        means[place].add({"v": value}, weight)
        if data.draw(st.booleans()):
            means[place] = pickle.loads(pickle.dumps(means[place]))
    one, two, three = data.draw(st.permutations(means))
    two.merge(three)
    one.merge(two)
    assert bits(one.result({"v": torch.zeros(70, dtype=dtype)})["v"]) == bits(defined(pairs, dtype))


@given(st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=5), st.integers(1, 2**31))
def test_any_weight_and_any_values_are_added_as_defined(values, weight):
    pairs = [(torch.tensor([v, -v, v / 3]), weight) for v in values]
    try:
        result = folded(pairs, torch.zeros(3))
    except ValueError:
        assert sum(abs(v) for v in values) * weight >= LIMIT
    else:
        assert bits(result) == bits(defined(pairs, torch.float32))


@pytest.mark.parametrize("reach", [KERNEL_LIMIT / 2, KERNEL_LIMIT, UPDATE_LIMIT, LIMIT / 8])
@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_values_of_any_size_below_the_limit_are_exact(reach, place):
    pairs = [(torch.tensor([0.1 * k, -3.0]), 3) for k in range(4)]
    pairs[place] = (torch.tensor([reach / 3, -reach / 7]), 3)
    assert bits(folded(pairs, torch.zeros(2))) == bits(defined(pairs, torch.float32))


def test_merged_lone_states_are_added_and_a_lone_one_stays_as_it_came():
    one, other, nobody = Mean(), Mean(), Mean()
    one.add(odd_state(1), 5)
    nobody.merge(one)
    kept = nobody.result(odd_state(9))
    assert {n: bits(t) for n, t in kept.items()} == {n: bits(t) for n, t in odd_state(1).items()}
    other.add(odd_state(2), 3)
    one.merge(other)
    direct = Mean()
    direct.add(odd_state(2), 3)
    direct.add(odd_state(1), 5)
    result, wanted = one.result(odd_state(9)), direct.result(odd_state(9))
    assert {n: bits(t) for n, t in result.items()} == {n: bits(t) for n, t in wanted.items()}


@given(st.data(), st.integers(0, 10**6))
def test_states_may_have_any_of_the_names_in_any_order(data, seed):
    states = []
    for k in range(data.draw(st.integers(1, 6))):
        names = data.draw(st.lists(st.sampled_from("abcde"), unique=True))
        generator = torch.Generator().manual_seed(seed + k)
        states.append({n: torch.randn(3, generator=generator) for n in names})
    weights = [k + 1 for k in range(len(states))]
    mean, other = Mean(), Mean()
    for k, state in enumerate(states):
        (mean, other)[data.draw(st.integers(0, 1))].add(state, weights[k])
    mean.merge(other)
    old = {n: torch.zeros(3) for n in "abcde"}
    result = mean.result(old)
    for name in "abcde":
        pairs = [(s[name], w) for s, w in zip(states, weights, strict=True) if name in s]
        wanted = defined(pairs, torch.float32) if pairs else old[name]
        assert bits(result[name]) == bits(wanted)
        assert mean.weights().get(name, 0) == sum(w for _, w in pairs)


def test_what_was_merged_or_sent_may_go_on():
    first, second = Mean(), Mean()
    for value in (1.0, 2.0):
        first.add({"v": number(value)}, 1)
    second.merge(first)
    for value in (6.0, 7.0):
        second.add({"v": number(value)}, 1)
        first.add({"v": number(0.0)}, 1)
    assert second.result({"v": number(0.0)})["v"].tolist() == [4.0]
    assert first.result({"v": number(0.0)})["v"].tolist() == [0.75]


def test_sums_are_sent_as_flat_arrays_and_can_be_added_to_where_memory_is_read_only():
    model = {f"p{k}": torch.randn(40) for k in range(10)}
    one = Sums()
    for weight in (1, 2, 3):
        one.add([Term("shared", model, weight), Term("expert", model, weight)])
    buffers = []
    raw = pickle.dumps(one, protocol=5, buffer_callback=buffers.append)
    assert len(raw) < 3000
    assert sum(b.raw().nbytes for b in buffers) <= 2 * (10 * 40 * 8 + 10 * 8)
    read_only = [memoryview(bytes(b.raw())) for b in buffers]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = pickle.loads(raw, buffers=read_only)
    other.add([Term("shared", model, 6)])
    other.merge(one)
    for name, value in other.mean("shared", model).items():
        torch.testing.assert_close(value, model[name])


def test_a_view_of_much_larger_memory_is_not_kept_alive():
    many = torch.randn(1000, 8)
    mean = Mean()
    mean.add({"v": many[3]}, 1)
    kept = mean.result({"v": torch.zeros(8)})["v"]
    assert torch.equal(kept, many[3]) and kept.untyped_storage().nbytes() == 32


def test_strided_values_and_those_with_a_history_are_added():
    wide = torch.randn(6, 5, requires_grad=True)
    mean = Mean()
    for _ in range(3):
        mean.add({"v": wide.t()}, 2)
    result = mean.result({"v": torch.zeros(5, 6)})["v"]
    assert not result.requires_grad
    torch.testing.assert_close(result, wide.t().detach())


@pytest.mark.parametrize(
    "value, message",
    [
        (torch.zeros(1, 1), r"'v' must be torch.float32 of shape \(1,\) .* got .* shape \(1, 1\)"),
        (torch.zeros(1).double(), "'v' must be torch.float32 .* got torch.float64"),
    ],
)
def test_states_must_be_of_one_kind(value, message):
    mean = Mean()
    mean.add({"v": number(1.0)}, 1)
    with pytest.raises(ValueError, match=message):
        mean.add({"v": value}, 1)
    mean.add({"v": number(3.0)}, 1)
    assert mean.result({"v": number(0.0)})["v"].tolist() == [2.0]
    other = Mean()
    for _ in range(2):
        other.add({"v": value}, 1)
    with pytest.raises(ValueError, match="must be torch.float32 of shape"):
        mean.merge(other)


@pytest.mark.parametrize("old", [{}, {"v": torch.zeros(2)}])
def test_a_mean_of_what_the_model_has_not_is_refused(old):
    mean = Mean()
    mean.add({"v": number(1.0)}, 1)
    with pytest.raises(ValueError, match=r"'v' must be of shape .* got \(1,\)"):
        mean.result(old)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 2.0 * LIMIT])
@pytest.mark.parametrize("place", range(4))
def test_too_large_a_value_never_gets_through(bad, place):
    def average():
        one = Sums()
        for k in range(4):
            one.add([Term("key", {"v": number(bad if k == place else 1.0)}, 1)])
        return one.mean("key", {"v": number(0.0)})

    with pytest.raises(ValueError, match="'v': weight times value must stay below"):
        average()


@pytest.mark.parametrize(
    "use",
    [lambda s: s.mean("key", {"v": number(0.0)}), pickle.dumps, lambda s: Sums().merge(s)],
    ids=["read", "sent", "merged"],
)
def test_too_large_a_lone_value_is_found_at_the_latest_when_it_is(use):
    def average():
        one = Sums()
        one.add([Term("key", {"v": number(torch.nan)}, 1)])
        use(one)

    with pytest.raises(ValueError, match="must stay below"):
        average()


def test_terms_of_weight_0_are_left_out_and_a_key_comes_once():
    one, old = Sums(), {"v": number(9.0)}
    one.add([Term("a", {"v": number(1.0)}, 2), Term("b", {"v": number(1.0)}, 0)])
    one.add([Term("a", {}, 5)])
    assert list(one) == ["a"] and len(one) == 1 and one["a"].weights() == {"v": 2}
    assert one.mean("a", old)["v"].item() == 1.0 and one.mean("b", old)["v"].item() == 9.0
    with pytest.raises(ValueError, match="key must come once among an update's terms, got a again"):
        one.add([Term("a", {"v": number(1.0)}, 1), Term("a", {"v": number(1.0)}, 1)])
    with pytest.raises(ValueError, match="weight must be 0 or more, got -1 for a"):
        one.add([Term("a", {"v": number(1.0)}, -1)])


def test_means_within_another_key_are_found_by_the_inner_one():
    one = Sums()
    one.add([Term(("a", "x"), {"v": number(1.0)}, 1), Term(("b", "x"), {"v": number(2.0)}, 1)])
    assert {k: m.weights() for k, m in one.within("b").items()} == {"x": {"v": 1}}
    assert one.within("b").mean("x", {"v": number(0.0)})["v"].item() == 2.0


def test_memory_does_not_grow_with_the_number_of_states(monkeypatch):
    kept = []
    monkeypatch.setattr(sums, "_owned", lambda values: kept.append(values) or values)
    mean = Mean()
    for k in range(9):
        mean.add({"v": torch.full((100,), float(k))}, 1)
    [part] = mean._parts
    waiting = [] if part.waiting is None else [part.waiting]
    assert len(waiting) <= 1 and part.flat.numel() == 100
    assert np.allclose(mean.result({"v": torch.zeros(100)})["v"], 4.0)
