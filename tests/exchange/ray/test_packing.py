import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmoe.exchange.ray import packing
from fedmoe.exchange.ray.packing import Shelf, pack, unpack

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
]


@pytest.fixture(autouse=True)
def _read_only():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        yield


def on_shelf():
    volumes = []

    def put(body):
        body.flags.writeable = False  # as what comes from Ray's object store
        volumes.append(body)
        return len(volumes) - 1

    return Shelf(put), volumes


def read(slip, volumes):
    return slip.read({number: volumes[number] for number in slip.volumes})


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def sample(dtype, shape, seed=0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 9).to(dtype)


@given(
    st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)), max_size=6
    )
)
def test_tensors_of_any_kind_and_shape_come_back_bit_for_bit(kinds):
    tensors = [sample(dtype, tuple(shape), i) for i, (dtype, shape) in enumerate(kinds)]
    shelf, volumes = on_shelf()
    for back in (unpack(pack(tensors)), read(shelf.slip(tensors), volumes)):
        assert all(same(a, b) for a, b in zip(tensors, back, strict=True))


def test_views_are_sent_as_what_they_show():
    whole = torch.arange(12.0).reshape(3, 4)
    parts = [whole.t(), whole[1], whole[:, ::2], whole[0].expand(2, 4)]
    back = unpack(pack(parts))
    assert all(same(a, b) for a, b in zip(parts, back, strict=True))
    assert len(pack(whole[1])[1]) == packing.ALIGN  # and not with what they are views of


def test_what_is_not_a_plain_tensor_comes_back_too():
    weight = torch.nn.Parameter(torch.ones(2))
    scale = torch.tensor(3.0)
    things = {
        "parameter": weight,
        "function": lambda x: x * scale,
        "array": np.arange(10.0),
        "strided": np.arange(10)[::3],
        "objects": np.array([{1: 2}, None], dtype=object),
    }
    back = unpack(pack(things))
    assert isinstance(back["parameter"], torch.nn.Parameter) and back["parameter"].requires_grad
    assert back["function"](torch.ones(1)) == 3
    assert np.array_equal(back["array"], things["array"])
    assert np.array_equal(back["strided"], things["strided"])
    assert back["objects"][0] == {1: 2}


def test_what_was_unpacked_has_memory_of_its_own():
    packed = pack({"w": torch.ones(4), "a": np.ones(4)})
    back = unpack(packed)
    back["w"].zero_()
    back["a"][:] = 0
    again = unpack(packed)
    assert again["w"].sum() == 4 and again["a"].sum() == 4


def test_a_tensor_is_put_on_the_shelf_once_and_stays_one():
    shared, own = torch.randn(100), [torch.randn(100), torch.randn(100)]
    shelf, volumes = on_shelf()
    slips = [shelf.slip({"shared": shared, "again": {"shared": shared}, "own": t}) for t in own]
    assert sum(len(v) for v in volumes) == 3 * 448  # of 400 bytes each, in steps of 64
    for slip, t in zip(slips, own, strict=True):
        back = read(slip, volumes)
        assert back["shared"] is back["again"]["shared"]
        assert same(back["shared"], shared) and same(back["own"], t)
    assert slips[0].volumes == {0} and slips[1].volumes == {0, 1}


def test_a_slip_without_new_tensors_makes_no_volume():
    shelf, volumes = on_shelf()
    w = torch.ones(3)
    shelf.slip([w])
    shelf.slip([w, 5])
    assert shelf.slip("no tensor").volumes == set()
    assert len(volumes) == 1


def test_a_full_volume_is_followed_by_another(monkeypatch):
    monkeypatch.setattr(packing, "VOLUME_BYTES", 1000)
    shelf, volumes = on_shelf()
    tensors = [sample(torch.float32, (100,), i) for i in range(7)]
    slip = shelf.slip(tensors)
    assert [len(v) for v in volumes] == [3 * 448, 3 * 448, 448]
    assert all(same(a, b) for a, b in zip(tensors, read(slip, volumes), strict=True))


def test_what_is_read_from_the_shelf_is_the_volume_itself_and_begins_where_torch_begins():
    shelf, volumes = on_shelf()
    slip = shelf.slip([torch.ones(3), torch.ones(5)])
    first, second = read(slip, volumes)
    assert second.data_ptr() - first.data_ptr() == packing.ALIGN
    assert first.data_ptr() == volumes[0].ctypes.data
