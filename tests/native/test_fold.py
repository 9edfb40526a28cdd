"""The kernel adds, takes away and divides as numpy does, to the bit, and refuses what it cannot."""

import numpy as np
import pytest
import torch

from fedmoe.native import fold

SCALE = 3.0 * 2**28

pytestmark = pytest.mark.skipif(not fold.available(), reason="no compiler here")


def rows_of(values, total, begin=False, scale=SCALE):
    count = len(values[0])
    rows = np.zeros(1, fold.ROW)
    rows["num"], rows["count"], rows["begin"] = len(values), count, begin
    shapes = [(count,)] * len(values)
    rows["value"][0, : len(values)] = fold.addresses(values, shapes, torch.float32)
    rows["scale"] = scale
    if total is not None:
        rows["total"] = fold.addresses([total], [(count,)], torch.int64)
    return rows


def terms(value, scale=SCALE):
    return torch.from_numpy(np.rint(value.double().numpy() * scale).astype(np.int64))


@pytest.mark.parametrize("count", [0, 1, 7, 127, 128, 129, 1000])
@pytest.mark.parametrize("num", [1, 2])
def test_what_arrives_is_added_and_measured(count, num):
    values = [torch.randn(count) for _ in range(num)]
    for begin in (False, True):
        total = torch.arange(count) * 10**9
        wanted = sum(terms(v) for v in values) + (0 if begin else total)
        rows = rows_of(values, total, begin)
        fold.arrive(rows)
        assert torch.equal(total, wanted)
        most = [float(v.abs().max()) if count else 0.0 for v in values]
        assert rows["most"][0, :num].tolist() == most


@pytest.mark.parametrize("value", [-0.0, torch.inf, -torch.inf, torch.nan, 3e38, 1e-45])
def test_without_a_total_values_are_measured_and_whatever_was_added_can_be_taken_away(value):
    odd, plain = torch.randn(300), torch.randn(300)
    odd[7] = value
    rows = rows_of([odd], None)
    fold.arrive(rows)
    np.testing.assert_equal(rows["most"][0, 0], float(odd.abs().max()))
    for place in range(2):
        total = torch.arange(300)
        rows = rows_of([odd, plain] if place == 0 else [plain, odd], total)
        fold.arrive(rows)
        fold.take_away(rows, place)
        assert torch.equal(total, torch.arange(300) + terms(plain))


@pytest.mark.parametrize("weight", [1, 3, 7, 49, 1000, 2**20 + 1, 2**31 - 1, 10**12 + 39])
def test_quotients_are_rounded_as_division_rounds_them(weight):
    generator = np.random.default_rng(weight)
    total = generator.integers(-(2**62), 2**62, 5000) >> generator.integers(0, 62, 5000)
    total[:9] = np.arange(-4, 5) * weight
    totals, out = torch.from_numpy(total), torch.empty(5000)
    rows = rows_of([torch.zeros(5000)], totals)
    fold.divide(fold.addresses([out], [(5000,)], torch.float32), rows, weight, 2.0**-28)
    wanted = (total.astype(np.float64) / weight / 2.0**28).astype(np.float32)
    assert np.array_equal(out.numpy().view(np.int32), wanted.view(np.int32))


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(3), torch.zeros(4).double(), torch.zeros(8)[::2], torch.zeros(4, device="meta")],
)
def test_memory_of_another_kind_is_refused(tensor):
    with pytest.raises(ValueError, match="must be torch.float32 on the CPU, in one piece"):
        fold.addresses([tensor], [(4,)], torch.float32)


def test_rows_must_be_rows():
    with pytest.raises(ValueError, match="rows must be of dtype ROW"):
        fold.arrive(np.zeros(3))
    with pytest.raises(ValueError, match="num must be from 1 to 2, got"):
        fold.arrive(np.zeros(1, fold.ROW))
    rows = rows_of([torch.zeros(4)], torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="out must be of 1 rows, got 2"):
        fold.divide(np.zeros(2, np.uint64), rows, 1, 1.0)


def test_without_a_compiler_there_is_no_kernel(monkeypatch):
    monkeypatch.setattr(fold, "_library", lambda: None)
    assert not fold.available()
    with pytest.raises(RuntimeError, match="ask `available` first"):
        fold.arrive(np.zeros(0, fold.ROW))
