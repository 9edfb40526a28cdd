import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmoe.population import (
    NO_LIMIT,
    Population,
    by_id,
    first_of_each_budget,
    in_order,
    together,
)
from fedmoe.types import ClientInfo

infos = st.builds(
    ClientInfo,
    st.integers(0, 50),
    st.none() | st.integers(0, 9),
    st.integers(0, 2**40),
    st.none() | st.sampled_from(["digits", "clothes"]),
)
clients_of_any_kind = st.lists(infos, max_size=12, unique_by=lambda c: c.id)
FIVE = [ClientInfo(k, 10 * k or None, k + 1, "odd" if k % 2 else None) for k in range(5)]


@given(clients_of_any_kind)
def test_a_population_is_the_clients_that_it_was_made_of(clients):
    ordered = sorted(clients, key=lambda c: c.id)
    population = Population.of(clients)
    assert len(population) == len(clients)
    assert list(population) == ordered
    assert [population[i] for i in range(len(clients))] == ordered
    assert [population[i - len(clients)] for i in range(len(clients))] == ordered
    assert list(reversed(population)) == ordered[::-1]
    assert population.ids.tolist() == [c.id for c in ordered]
    assert all(c in population for c in clients)


@given(clients_of_any_kind, st.integers(0, 9), st.integers(0, 14), st.integers(1, 4))
def test_a_slice_is_the_population_of_these_clients(clients, low, high, step):
    ordered = sorted(clients, key=lambda c: c.id)
    assert list(Population.of(clients)[low:high:step]) == ordered[low:high:step]
    assert Population.of(clients)[low:high:step] == Population.of(ordered[low:high:step])


@given(clients_of_any_kind, infos)
def test_by_id_it_is_the_same_mapping_as_a_tuple_is(clients, other):
    mapping, population = by_id(tuple(clients)), by_id(Population.of(clients))
    assert population == mapping and dict(population) == mapping
    assert list(population) == sorted(mapping)
    assert (other.id in population) == (other.id in mapping)
    assert population.get(other.id) == mapping.get(other.id)
    assert np.int64(other.id) not in population or other.id in mapping


@given(clients_of_any_kind, clients_of_any_kind)
def test_equal_clients_and_no_others_have_one_hash(some, others):
    one, other = Population.of(some), Population.of(others)
    same = sorted(some, key=lambda c: c.id) == sorted(others, key=lambda c: c.id)
    assert (one == other) == (one.digest == other.digest) == same
    back = pickle.loads(pickle.dumps(one))
    assert back == one and list(back) == list(one) and hash(back) == hash(one)


@given(clients_of_any_kind)
def test_what_is_done_with_a_tuple_is_done_with_a_population(clients):
    ordered = sorted(clients, key=lambda c: c.id)
    population = Population.of(clients)
    assert list(in_order(population)) == in_order(tuple(clients)) == ordered
    assert first_of_each_budget(population) == first_of_each_budget(ordered)
    half = len(clients) // 2
    whole = together(Population.of(clients[:half]), tuple(clients[half:]))
    assert list(whole) == ordered


def test_one_client_for_each_budget_is_the_first_that_has_it():
    clients = [ClientInfo(k, memory) for k, memory in enumerate((5, None, 5, 3, None, 3))]
    assert [c.id for c in first_of_each_budget(clients)] == [0, 1, 3]
    assert [c.id for c in first_of_each_budget(Population.of(clients))] == [0, 1, 3]
    assert first_of_each_budget(Population.of([])) == []
    nobody = Population(np.ones(4, np.int32))
    assert first_of_each_budget(nobody) == [ClientInfo(0)]


def test_without_others_clients_stay_as_they_are():
    population = Population.of(FIVE)
    assert together(population, ()) is population
    assert together((FIVE[0],), (FIVE[1],)) == (FIVE[0], FIVE[1])
    assert list(together((FIVE[3],), Population.of(FIVE[:1]))) == [FIVE[0], FIVE[3]]


def test_two_clients_of_one_id_are_refused():
    with pytest.raises(ValueError, match="id_C must ascend"):
        Population.of([FIVE[1], replace(FIVE[2], id=1)])
    with pytest.raises(ValueError, match="id_C must ascend"):
        together(Population.of(FIVE), FIVE[2:3])


def test_other_budgets_can_be_given():
    population = Population.of(FIVE).with_memory([1, NO_LIMIT, 3, 4, 5])
    assert [c.memory_bytes for c in population] == [1, None, 3, 4, 5]
    assert [c.task for c in population] == [c.task for c in FIVE]


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"memory_C": np.ones(2, np.int64)}, r"memory_C must hold a whole number for each of the"),
        ({"memory_C": np.ones(3)}, "memory_C must hold a whole number"),
        ({"task_C": np.array([0, 1, 2])}, "task_C must be from 0 to the 1 tasks, got 0 to 2"),
        ({"id_C": np.array([0, 2, 2])}, "id_C must ascend"),
        ({"id_C": np.array([-1, 2, 3])}, "id_C must be 0 or more"),
        ({"id_C": np.array([0, 2, 2**32])}, r"below 2\*\*32"),
    ],
)
def test_columns_that_do_not_fit_are_refused(columns, message):
    with pytest.raises(ValueError, match=message):
        Population(np.ones(3, np.int64), tasks=("a",), **columns)


def test_a_place_beyond_the_last_client_is_none():
    for place in (5, -6):
        with pytest.raises(IndexError, match="place must be below the 5 clients"):
            Population.of(FIVE)[place]
    with pytest.raises(ValueError, match="step of 1 or more, got -1"):
        Population.of(FIVE)[::-1]
    with pytest.raises(KeyError):
        by_id(Population.of(FIVE))[5]


def test_a_million_clients_take_a_few_bytes_each_and_one_is_as_soon_found():
    size_C = np.arange(1_000_000, dtype=np.int32)
    population = Population(size_C).with_memory(np.full(1_000_000, 7))
    columns = (population.num_examples_C, population.memory_C)
    assert sum(c.nbytes for c in columns) == 12_000_000
    assert population[999_999] == by_id(population)[999_999] == ClientInfo(999_999, 7, 999_999)
    assert population[10:].num_examples_C.base is size_C  # a slice copies no sizes
