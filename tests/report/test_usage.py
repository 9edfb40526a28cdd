"""Who held which expert and how much it was used, by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from fedmoe.report.log import RoundRecord, Run, RunInfo
from fedmoe.report.usage import (
    activations_by_layer,
    dead_experts,
    held_at_end,
    held_by_round,
    holders_by_layer,
    load_cv_by_layer,
    use_by_client,
)
from fedmoe.types import ExpertId


@pytest.fixture
def run(info: Callable[..., RunInfo], record: Callable[..., RoundRecord]) -> Run:
    """Client 0 explores, drops expert 2, and sits round 2 out; client 1 comes in round 1."""
    rounds = [
        replace(record(0, "explore"), held={0: [[0, 1, 2, 3]]}, count={0: [[9, 9, 9, 9]]}),
        replace(
            record(1),
            held={0: [[0, 1, 2]], 1: [[1]]},
            count={0: [[2, 0, 4, 0]], 1: [[0, 6, 0, 0]]},
        ),
        replace(record(2), held={0: [[0, 1]], 1: [[1]]}, count={1: [[0, 4, 0, 0]]}),
    ]
    return Run(info(rounds=3), rounds)


def test_a_client_keeps_what_it_had_until_a_round_says_otherwise(run: Run) -> None:
    silent = replace(run.rounds[2], held={}, count={})
    run = replace(run, rounds=[*run.rounds[:2], silent])
    one = frozenset([ExpertId(0, 1)])
    assert held_by_round(run, 1) == [None, one, one]
    assert held_at_end(run)[0] == {(0, 0), (0, 1), (0, 2)}


def test_holders_are_counted_at_the_end(run: Run) -> None:
    assert holders_by_layer(run)[0].tolist() == [1, 2, 0, 0]


def test_exploring_does_not_count_as_load(run: Run) -> None:
    assert activations_by_layer(run)[0].tolist() == [2, 10, 4, 0]
    assert dead_experts(run) == [(0, 3)]


def test_the_load_cv_is_standard_deviation_over_mean(run: Run) -> None:
    # mean 4; deviations -2, 6, 0, -4: variance 56 / 4 = 14
    assert load_cv_by_layer(run) == [pytest.approx(14**0.5 / 4)]


def test_an_even_load_has_cv_zero_and_no_load_has_none(run: Run) -> None:
    explored = replace(run, rounds=run.rounds[:1])
    assert load_cv_by_layer(explored) == [0.0]
    assert load_cv_by_layer(replace(run, rounds=[])) == [None]


def test_only_the_last_rounds_make_an_expert_dead(run: Run) -> None:
    assert dead_experts(run, last=1) == [(0, 0), (0, 2), (0, 3)]
    assert dead_experts(replace(run, rounds=[])) == []


def test_use_is_shared_among_the_experts_that_a_client_still_holds(run: Run) -> None:
    use = use_by_client(run)
    # Client 0 last trained with 2, 0, 4, 0; of these it still holds the first two.
    np.testing.assert_array_equal(use[0][0], [1.0, 0.0, np.nan, np.nan])
    np.testing.assert_array_equal(use[1][0], [np.nan, 1.0, np.nan, np.nan])


def test_zeros_behind_a_short_layer_are_not_experts(
    info: Callable[..., RunInfo], record: Callable[..., RoundRecord]
) -> None:
    one = replace(record(0), held={0: [[0, 1, 2], [1]]}, count={0: [[1, 1, 1], [0, 5, 0]]})
    run = Run(info(num_experts_L=(3, 2)), [one])
    assert activations_by_layer(run)[1].tolist() == [0, 5]
    assert dead_experts(run) == [(1, 0)]
