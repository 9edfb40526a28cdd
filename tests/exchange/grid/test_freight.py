import pickle

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedmoe.exchange.grid.freight import LARGE, Store, packed, unpacked


def store():
    """A store, and what was put into it."""
    put = []

    def keep(data):
        put.append(data)
        return len(put) - 1

    return Store(keep), put


def large(seed, size=LARGE):
    return np.random.default_rng(seed).bytes(size)


def test_large_values_go_beside_and_come_back():
    values, put = store()
    content = RecordDict(
        {
            "a": ArrayRecord({"large": Array("uint8", (LARGE,), "raw", large(0)),
                              "small": Array(np.arange(3))}),
            "c": ConfigRecord({"large": large(1), "text": "x"}),
        }
    )
    head = packed([content, content], values.key_of)
    assert len(put) == 2 and len(head) < 3000
    first, second = unpacked(head, lambda key: values[key].data)
    assert first == content and first is second


def test_without_large_values_it_is_a_pickle():
    values, put = store()
    parts = [1, "two", b"3" * (LARGE - 1)]
    assert pickle.loads(packed(parts, values.key_of)) == parts
    assert not put


def test_one_value_is_put_once_and_an_equal_one_not_again():
    values, put = store()
    data = large(0)
    equal = bytes(bytearray(data))
    assert equal is not data
    assert values.key_of(data) == values.key_of(data) == values.key_of(equal)
    assert put == [data]


@pytest.mark.parametrize("place", [70, LARGE // 4, LARGE // 2, LARGE - 1])
def test_values_that_differ_in_one_byte_are_two(place):
    values, put = store()
    data = large(0)
    other = bytearray(data)
    other[place] ^= 1
    assert values.key_of(data) != values.key_of(bytes(other))
    assert len(put) == 2


def test_what_the_last_push_did_not_use_is_let_go():
    values, put = store()
    kept, dropped = large(0), large(1)
    first = values.key_of(kept), values.key_of(dropped)
    values.turn_over()
    assert values.key_of(kept) == first[0]
    values.turn_over()
    with pytest.raises(KeyError):
        values[first[1]]
    assert values.key_of(dropped) not in first
    assert len(put) == 3
    assert values.key_of(bytes(bytearray(kept))) == first[0]


def test_an_equal_value_is_not_held_beyond_its_push():
    values, _ = store()
    values.key_of(large(0))
    values.key_of(large(0))
    values.turn_over()
    assert not values._twins and len(values._by_id) == 1
