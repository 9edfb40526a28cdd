import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmoe.rng import numpy_generator, torch_generator

words = st.integers(0, 2**32 - 1) | st.integers(0, 3)
keys = st.tuples(words, st.lists(words, max_size=5).map(tuple))


def first(seed, key):
    """The first 128 bits of either generator."""
    raw = numpy_generator(seed, *key).bit_generator.random_raw(2)
    return tuple(int(r) for r in raw), torch_generator(seed, *key).initial_seed()


@given(keys)
def test_the_same_key_gives_the_same_numbers(key):
    seed, rest = key
    assert first(seed, rest) == first(seed, rest)
    a, b = torch_generator(seed, *rest), torch_generator(seed, *rest)
    assert torch.equal(torch.randn(5, generator=a), torch.randn(5, generator=b))


@given(keys, keys)
def test_different_keys_give_different_numbers(a, b):
    if a != b:
        assert first(*a)[0] != first(*b)[0]
        assert first(*a)[1] != first(*b)[1]


@pytest.mark.parametrize(
    "a, b",
    [
        ((0, ()), (0, (0,))),
        ((0, (0,)), (0, (0, 0))),
        ((1, (2,)), (2, (1,))),
        ((0, (1, 2)), (0, (2, 1))),
        ((0, (1, 1)), (1, (0, 1))),
    ],
    ids=str,
)
def test_a_key_is_told_by_its_length_and_order_too(a, b):
    assert first(*a)[0] != first(*b)[0] and first(*a)[1] != first(*b)[1]


def test_these_numbers_are_those_of_every_version():
    # Results that are written down rest on them.
    assert numpy_generator(0, 1, 2).integers(0, 1000, 4).tolist() == [871, 139, 549, 107]
    assert torch.randperm(6, generator=torch_generator(0, 1, 2)).tolist() == [0, 3, 5, 4, 1, 2]
    assert torch_generator(3).initial_seed() == 3244436091024797979


def test_the_global_generators_are_left_alone():
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    numpy_generator(0, 1).random(3)
    torch.randn(3, generator=torch_generator(0, 1))
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert (np.random.get_state()[1] == numpy_before).all()


@pytest.mark.parametrize(
    "seed, key", [(-1, ()), (0, (-1,)), (0, (3, -2)), (2**32, ()), (0, (2**32,))]
)
@pytest.mark.parametrize("make", [numpy_generator, torch_generator])
def test_a_number_that_could_meet_another_key_is_refused(make, seed, key):
    with pytest.raises(ValueError, match="must be 0 or more and below 2\\*\\*32, got seed"):
        make(seed, *key)
