import pickle
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmoe.table import PAGE, Form, Table, ids_of
from fedmoe.types import ExpertId, SubMoE

EXPERTS = tuple(ExpertId(layer, e) for layer in range(2) for e in range(5))


@dataclass(frozen=True)
class Standing:
    best: float = -1.0
    stale: int = 0
    previous: SubMoE | None = None
    frozen: bool = False


sub_moes = st.frozensets(st.sampled_from(EXPERTS))
standings = st.builds(
    Standing, st.floats(-1, 1), st.integers(0, 2**40), st.none() | sub_moes, st.booleans()
)
tensors = st.lists(st.floats(0, 1), min_size=3, max_size=3).map(
    lambda row: torch.tensor([row], dtype=torch.float64)
)
KINDS = {
    "sub-MoEs": (Form(SubMoE, EXPERTS), sub_moes),
    "records": (Form(Standing, EXPERTS), standings),
    "tensors": (Form(Tensor, shape=(1, 3)), tensors),
    "numbers": (Form(int), st.integers(-(2**60), 2**60)),
    "truths": (Form(bool), st.booleans()),
    "shares": (Form(float), st.floats(0, 1)),
}


def same(a: Mapping, b: Mapping) -> bool:
    def equal(x, y):
        if isinstance(x, Tensor):
            return x.dtype == y.dtype and torch.equal(x, y)
        return type(x) is type(y) and x == y

    return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_table_is_the_mapping_that_it_was_made_of(kind, data):
    form, values = KINDS[kind]
    some = st.dictionaries(st.integers(0, 300), values, max_size=8)
    expected: dict = {}
    table, tables = Table.of(form, {}), []
    for changes in data.draw(st.lists(some, max_size=4)):
        expected = expected | changes
        table = table | changes
        tables.append((table, expected))
    for made, wanted in tables:  # what came later has changed none that was there
        assert same(made, wanted)
        assert list(made) == sorted(wanted) == ids_of(made).tolist() == ids_of(wanted).tolist()
    back = Table.from_rows(form, table.id_K, table.rows())
    assert same(back, expected) and same(pickle.loads(pickle.dumps(table)), expected)


def test_only_pages_that_change_are_copied():
    many = Table.of(Form(int), {k: k for k in range(10 * PAGE)})
    one = many | {3 * PAGE: -1}
    copied = [a is not b for a, b in zip(many.pages, one.pages, strict=True)]
    assert copied == [page == 3 for page in range(10)]
    more = many | {10 * PAGE + 5: 1}
    assert all(a is b for a, b in zip(many.pages, more.pages, strict=False))
    assert len(more.pages) == 11


def test_two_tables_may_go_on_from_one():
    start = Table.of(Form(int), {5: 5})
    left, right = start | {1: 1}, start | {9: 9, 5: 6}
    assert (dict(start), dict(left), dict(right)) == ({5: 5}, {1: 1, 5: 5}, {5: 6, 9: 9})
    assert start | {} is start


def test_a_value_that_comes_out_may_be_written_to():
    table = Table.of(Form(Tensor, shape=(2,)), {0: torch.tensor([1.0, 2.0]).double()})
    table[0][0] = 7.0
    assert table[0].tolist() == [1.0, 2.0]


def test_bits_and_halves_take_few_bytes():
    assert Form(SubMoE, EXPERTS).row.itemsize == 2  # 10 experts
    assert Form(Tensor, dtype="float32", shape=(1, 16)).row.itemsize == 64
    assert Form(Standing, EXPERTS).row.itemsize == 8 + 8 + (1 + 2) + 1


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"must have shape \(2,\), got \(3,\)"):
        Table.of(Form(Tensor, shape=(2,)), {0: torch.zeros(3)})
    with pytest.raises(KeyError):
        Table.of(Form(SubMoE, EXPERTS), {0: frozenset({ExpertId(7, 7)})})
    with pytest.raises(TypeError, match="fixed width"):
        Table.of(Form(str), {0: "a"})
    with pytest.raises(ValueError, match="ids must ascend"):
        Table.from_rows(Form(int), np.array([2, 1]), np.zeros(2, Form(int).row))


def test_who_is_not_there_is_not_found():
    table = Table.of(Form(int), {3: 1})
    assert 2 not in table and np.int64(3) in table and "3" not in table
    with pytest.raises(KeyError):
        table[4]
