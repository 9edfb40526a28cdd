"""The ways that are timed come to the same averages, and rows say what scripts read."""

import numpy as np
import pytest
import torch

from simulations.bench_aggregate import Case, flower_sum, rows_of, ways_of_parts, ways_of_whole


@pytest.mark.parametrize("tensors", [1, 3])
def test_all_average_the_same_updates(tensors):
    ways = ways_of_whole(Case("", 5, 300, tensors))
    flat_N = ways["flat stream"]()
    for name in ("ours", "ours, no kernel"):
        if name in ways:
            ours_N = torch.cat(list(ways[name]().shared.values()))
            torch.testing.assert_close(ours_N, flat_N)
    for arrays in (
        {n: a.numpy() for n, a in ways["flower"]().items()},
        ways["flower, decoded"](),
    ):
        np.testing.assert_allclose(np.concatenate(list(arrays.values())), flat_N, atol=1e-5)


def test_parts_of_experts_are_averaged_over_those_who_held_them():
    ways = ways_of_parts(Case("", 9, 60, 2, 8, 2))
    flat_EN = ways["flat stream"]()
    ours = ways["ours"]()
    for e, state in ours.experts.items():
        torch.testing.assert_close(torch.cat(list(state.values())), flat_EN[e.expert])


def test_flowers_arithmetic_worked_by_hand():
    [value] = flower_sum([{"v": torch.tensor([1.0])}, {"v": torch.tensor([5.0])}], [3, 1]).values()
    assert value.tolist() == [2.0]  # 3/4 * 1 + 1/4 * 5


def test_a_ratio_above_1_says_that_ours_is_faster():
    times_s = {"ours": 0.002, "flat stream": 0.003, "flower": 0.008}
    rows = {row["peer"]: row for row in rows_of(Case("50 x 4 MB", 50, 10), times_s)}
    assert rows.keys() == {"flat stream", "flower"}
    assert rows["flower"] == {
        "case": "50 x 4 MB", "peer": "flower", "ours": 2.0, "theirs": 8.0, "unit": "ms",
        "ratio": 4.0, "over_flat": 0.667,
    }
