"""Differences between methods, by hand and against the tables of Student's t."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from fedmoe.report.log import ClientAccuracy, RoundRecord, Run, RunInfo
from fedmoe.report.paired import (
    paired_over_clients,
    paired_over_seeds,
    rows_over_clients,
    rows_over_seeds,
    t_95,
)
from fedmoe.report.rows import full_row


@pytest.fixture
def runs(
    info: Callable[..., RunInfo], record: Callable[..., RoundRecord]
) -> Callable[..., list[Run]]:
    def make(method: str, accuracy_per_seed: list[list[float]]) -> list[Run]:
        return [
            Run(
                info(method, seed),
                [
                    replace(
                        record(0),
                        accuracy={c: ClientAccuracy(None, a) for c, a in enumerate(accuracies)},
                    )
                ],
            )
            for seed, accuracies in enumerate(accuracy_per_seed)
        ]

    return make


def test_seeds_are_paired_and_not_pooled(runs: Callable[..., list[Run]]) -> None:
    first = runs("a", [[0.2, 0.4], [0.7, 0.7], [0.9, 0.9]])
    second = runs("b", [[0.2, 0.2], [0.5, 0.5], [0.6, 0.6]])
    difference = paired_over_seeds(first, second)
    assert difference.num_pairs == 3
    assert difference.mean == pytest.approx(0.2)  # (0.1 + 0.2 + 0.3) / 3
    # standard deviation 0.1, t of 2 degrees 4.303: 4.303 * 0.1 / sqrt(3)
    assert difference.high == pytest.approx(0.2 + 0.24843, abs=1e-5)
    assert difference.low == pytest.approx(0.2 - 0.24843, abs=1e-5)


def test_only_seeds_that_both_methods_ran_are_paired(runs: Callable[..., list[Run]]) -> None:
    difference = paired_over_seeds(runs("a", [[0.5], [0.9]]), runs("b", [[0.25]]))
    assert (difference.mean, difference.num_pairs) == (0.25, 1)
    assert difference.low is difference.high is None


def test_clients_are_paired_by_seed_and_id(runs: Callable[..., list[Run]]) -> None:
    difference = paired_over_clients(runs("a", [[0.5, 0.75]]), runs("b", [[0.25, 0.0]]))
    assert (difference.mean, difference.num_pairs) == (0.5, 2)  # (0.25 + 0.75) / 2


def test_rows_pair_as_their_runs_do(runs: Callable[..., list[Run]]) -> None:
    first = runs("a", [[0.2, 0.4], [0.7, 0.7], [0.9, 0.9]])
    second = runs("b", [[0.2, 0.2], [0.5, 0.5]])
    rows = [[full_row(run, "p") for run in own] for own in (first, second)]
    assert rows_over_seeds(*rows) == paired_over_seeds(first, second)
    assert rows_over_clients(*rows) == paired_over_clients(first, second)


def test_a_pair_with_different_partitions_is_refused(runs: Callable[..., list[Run]]) -> None:
    (first,), (second,) = runs("a", [[0.5]]), runs("b", [[0.5]])
    other = replace(second, info=replace(second.info, partition_hash="elsewhere"))
    with pytest.raises(ValueError, match="must share its partition, got part0 for a and elsewhere"):
        paired_over_seeds([first], [other])


def test_methods_without_a_common_seed_have_no_difference(
    runs: Callable[..., list[Run]],
) -> None:
    with pytest.raises(ValueError, match="must share a seed that measured personal_mean"):
        paired_over_seeds(runs("a", [[0.5]]), [])


@pytest.mark.parametrize(
    "df, expected",
    [(1, 12.706), (2, 4.303), (9, 2.262), (30, 2.042), (35, 2.030), (50, 2.009), (100, 1.984)],
)
def test_t_is_the_tabled_value(df: int, expected: float) -> None:
    assert t_95(df) == pytest.approx(expected, abs=0.0011)


def test_t_of_no_freedom_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        t_95(0)
