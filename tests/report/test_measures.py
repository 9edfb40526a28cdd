"""Accuracies and costs, by numbers worked by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from fedmoe.report.log import ClientAccuracy, RoundRecord, Run, RunInfo
from fedmoe.report.measures import (
    accepted_share,
    aggregate_rows,
    best_evaluation,
    bytes_to_accuracy,
    client_memory_bytes,
    cumulative_bytes,
    evaluations,
    final_evaluation,
    first_to_reach,
    global_curve,
    over_clients,
    result_row,
    rounds_to_share_of_final,
    table_rows,
)
from fedmoe.types import ClientFailure

# The keys that design.md names for a row of results.
RESULT_KEYS = [
    "protocol",
    "method",
    "seed",
    "rounds",
    "personal_mean",
    "personal_std",
    "personal_worst_tenth",
    "global",
    "bytes_up",
    "bytes_down",
    "client_memory_bytes",
    "seconds",
    "partition_hash",
]


@pytest.fixture
def run(info: Callable[..., RunInfo], record: Callable[..., RoundRecord]) -> Run:
    """Two clients, two rounds and a closing evaluation."""
    start = replace(
        record(0, "explore"),
        bytes_down=100,
        bytes_up=10,
        bytes_once=80,
        memory_bytes={0: 70, 1: 90},
        accuracy={0: ClientAccuracy(0.2, 0.1), 1: ClientAccuracy(0.2, 0.3)},
        global_accuracy=0.15,
    )
    middle = replace(
        record(1), bytes_down=50, bytes_up=20, memory_bytes={1: 60}, refused=[ClientFailure(0, "")]
    )
    end = replace(
        record(2, "final"),
        bytes_down=30,
        accuracy={
            0: ClientAccuracy(0.5, 0.4, 0.7, 0.8),  # validation prefers the trained one
            1: ClientAccuracy(0.6, 0.6, 0.6, 0.9),  # a tie: as received
        },
        global_accuracy=0.55,
    )
    return Run(info(), [start, middle, end])


@pytest.mark.parametrize(
    "accuracy, chosen",
    [
        (ClientAccuracy(0.5, 0.1, 0.6, 0.2), 0.2),
        (ClientAccuracy(0.6, 0.1, 0.5, 0.2), 0.1),
        (ClientAccuracy(0.5, 0.1, 0.5, 0.2), 0.1),  # a tie
        (ClientAccuracy(None, 0.1, 0.9, 0.2), 0.1),  # nothing to choose by
        (ClientAccuracy(0.5, None, 0.6, 0.2), 0.2),
        (ClientAccuracy(0.5, 0.1, 0.6, None), 0.1),
    ],
)
def test_validation_alone_decides_which_model_a_client_keeps(
    accuracy: ClientAccuracy,
    chosen: float,
    info: Callable[..., RunInfo],
    record: Callable[..., RoundRecord],
) -> None:
    run = Run(info(), [replace(record(0), accuracy={0: accuracy})])
    assert evaluations(run)[0].chosen == {0: chosen}


def test_the_worst_tenth_is_rounded_up_to_whole_clients() -> None:
    spread = over_clients({c: c / 20 for c in range(11)})  # worst two: 0 and 0.05
    assert spread.worst_tenth == pytest.approx(0.025)
    assert over_clients({0: 0.4, 1: 0.8}).worst_tenth == pytest.approx(0.4)


def test_the_spread_over_clients_is_that_of_all_clients() -> None:
    spread = over_clients({0: 0.8, 1: 0.6})
    assert spread.mean == pytest.approx(0.7)
    assert spread.std == pytest.approx(0.1)  # sqrt((0.1^2 + 0.1^2) / 2), not / 1


def test_no_clients_have_no_mean() -> None:
    with pytest.raises(ValueError, match="at least one client"):
        over_clients({})


def test_a_model_costs_what_was_sent_before_it_was_measured(run: Run) -> None:
    assert [(e.round, e.bytes_total) for e in evaluations(run)] == [
        (0, 100),  # its way down
        (2, 210),  # 110 + 70, and its way down: 30
    ]
    assert cumulative_bytes(run) == [110, 180, 210]


def test_the_final_accuracies_are_those_of_the_last_evaluation(run: Run) -> None:
    final = final_evaluation(run)
    assert final is not None
    assert final.received == {0: 0.4, 1: 0.6}
    assert final.trained == {0: 0.8, 1: 0.9}
    assert final.chosen == {0: 0.8, 1: 0.6}


def test_a_target_is_reached_in_the_first_round_that_is_good_enough(run: Run) -> None:
    # mean chosen: 0.2 after 0 rounds, 0.7 after 2
    assert bytes_to_accuracy(run, 0.2) == 100
    assert bytes_to_accuracy(run, 0.21) == 210
    assert bytes_to_accuracy(run, 0.71) is None
    assert first_to_reach(run, 0.5) == final_evaluation(run)
    assert rounds_to_share_of_final(run, 0.25) == 0  # 0.175
    assert rounds_to_share_of_final(run, 0.9) == 2


def test_the_best_round_is_found_by_validation_and_never_by_test(
    info: Callable[..., RunInfo], record: Callable[..., RoundRecord]
) -> None:
    rounds = [
        replace(record(r), accuracy={0: ClientAccuracy(validation, test)})
        for r, (validation, test) in enumerate([(0.6, 0.5), (0.7, 0.4), (0.7, 0.9), (0.5, 0.95)])
    ]
    best = best_evaluation(Run(info(rounds=9), rounds))
    assert best is not None and (best.round, best.chosen) == (1, {0: 0.4})


def test_a_round_that_measured_few_clients_cannot_be_the_best(
    info: Callable[..., RunInfo], record: Callable[..., RoundRecord]
) -> None:
    good, poor = ClientAccuracy(0.9, 0.9), ClientAccuracy(0.5, 0.5)
    rounds = [
        replace(record(0), accuracy={0: good}),
        replace(record(1), accuracy={0: good, 1: poor}),
    ]
    best = best_evaluation(Run(info(), rounds))
    assert best is not None and best.round == 1


def test_a_row_of_results_has_the_promised_keys_and_values(run: Run) -> None:
    row = result_row(run, "hand")
    assert list(row)[: len(RESULT_KEYS)] == RESULT_KEYS
    assert row["protocol"] == "hand" and row["rounds"] == 2
    assert row["personal_mean"] == pytest.approx(0.7)  # (0.8 + 0.6) / 2
    assert row["personal_std"] == pytest.approx(0.1)
    assert row["personal_worst_tenth"] == pytest.approx(0.6)
    assert row["accuracy_received_mean"] == pytest.approx(0.5)
    assert row["accuracy_trained_mean"] == pytest.approx(0.85)
    assert row["global"] == 0.55 and global_curve(run) == [(0, 0.15), (2, 0.55)]
    assert (row["bytes_up"], row["bytes_down"], row["bytes_total"]) == (30, 180, 210)
    assert (row["bytes_once"], row["rounds_exploring"]) == (80, 1)
    assert row["client_memory_bytes"] == client_memory_bytes(run) == 90
    assert (row["seconds"], row["rounds_done"], row["refusals"]) == (3.0, 2, 1)
    assert accepted_share(run) == 0.5


def test_a_run_that_measured_nothing_has_a_row_without_values(
    info: Callable[..., RunInfo],
) -> None:
    row = result_row(Run(info(), []), "")
    assert row["personal_mean"] is row["global"] is row["client_memory_bytes"] is None
    assert row["bytes_up"] == row["dead_experts"] == 0


def test_seeds_become_a_mean_and_a_sample_standard_deviation(run: Run) -> None:
    other = replace(run, info=replace(run.info, seed=1), rounds=run.rounds[:1])
    (row,) = table_rows([run, other])
    assert row.num_seeds == 2
    assert row.values["personal_mean"].mean == pytest.approx(0.45)  # (0.7 + 0.2) / 2
    assert row.values["personal_mean"].std == pytest.approx(0.353553, abs=1e-6)  # 0.5 / sqrt(2)
    assert "accuracy_trained_mean" not in row.values  # only one of the two has it


def test_rows_of_two_protocols_are_no_table(run: Run) -> None:
    with pytest.raises(ValueError, match="one protocol, got a, b"):
        aggregate_rows([result_row(run, "a"), result_row(run, "b")])


def test_a_seed_that_comes_twice_is_an_error(run: Run) -> None:
    with pytest.raises(ValueError, match="each seed of fedmoe must come once"):
        table_rows([run, run])


def test_published_rows_stay_by_themselves(run: Run) -> None:
    row = result_row(run, "a")
    published = {**row, "published": True, "personal_mean": 0.9}
    assert [(r.method, r.published) for r in aggregate_rows([row, published])] == [
        ("fedmoe", False),
        ("fedmoe", True),
    ]
