"""Rows with all that a comparison needs: by hand, and against the logs that they are made from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedmoe.report.log import ClientAccuracy, ClientEntry, RoundRecord, Run, RunInfo
from fedmoe.report.measures import result_row
from fedmoe.report.rows import KINDS, full_row, read_rows, received_and_tuned, write_rows
from fedmoe.types import ClientFailure


@pytest.fixture
def run(info: Callable[..., RunInfo], record: Callable[..., RoundRecord]) -> Run:
    """Two clients with 100 and 300 test examples; client 1 fails once."""
    clients = (ClientEntry(0, None, None, 9, 9, 100), ClientEntry(1, None, None, 9, 9, 300))
    first = replace(
        record(0),
        bytes_down=100,
        bytes_up=10,
        accuracy={0: ClientAccuracy(0.5, 0.2, 0.6, 0.4)},
        failed=[ClientFailure(1, "lost")],
    )
    # Client 0 would keep the trained model, client 1 the received one.
    end = {0: ClientAccuracy(0.5, 0.6, 0.7, 0.8), 1: ClientAccuracy(0.9, 0.4, 0.2, 0.5)}
    last = replace(record(2, "final"), bytes_down=40, accuracy=end, global_accuracy=0.3)
    return Run(replace(info(), clients=clients), [first, replace(record(1), bytes_down=7), last])


def test_a_row_says_what_result_row_says(few_runs: list[Run]) -> None:
    for run in few_runs:
        row = full_row(run, "p")
        assert result_row(run, "p").items() <= row.items()


def test_each_of_the_three_accuracies_has_mean_spread_and_weighted_mean(run: Run) -> None:
    row = full_row(run, "p")
    assert row["personal_mean"] == pytest.approx(0.6)  # (0.8 + 0.4) / 2
    assert row["personal_std"] == pytest.approx(0.2)
    assert row["personal_weighted_mean"] == pytest.approx(0.5)  # (0.8 * 100 + 0.4 * 300) / 400
    assert row["accuracy_received_weighted_mean"] == pytest.approx(0.45)  # (60 + 120) / 400
    assert row["accuracy_trained_worst_tenth"] == pytest.approx(0.5)
    assert row["chosen_by_client"] == {"0": 0.8, "1": 0.4}
    assert row["received_by_client"] == {"0": 0.6, "1": 0.4}
    assert row["trained_by_client"] == {"0": 0.8, "1": 0.5}


def test_the_curve_has_the_traffic_up_to_each_evaluation(run: Run) -> None:
    first, last = full_row(run, "p")["curve"]
    assert (first["round"], first["bytes"], first["trained"]) == (0, 100, 0.4)
    # 100 + 10 + 7 before the last model's way down of 40.
    assert (last["round"], last["bytes"], last["received"], last["chosen"]) == (2, 157, 0.5, 0.6)


def test_clients_that_ever_failed_versions_and_size_are_in_the_row(run: Run) -> None:
    row = full_row(run, "p")
    assert row["failed_clients"] == [1] and row["versions"] == {"fedmoe": "0.1.0"}
    assert row["model_parameters"] == 1000


def test_a_row_agrees_with_its_log_computed_directly(many_runs: list[Run]) -> None:
    for run in many_runs[::4]:
        row = full_row(run, "p")
        logged = [r for r in run.rounds if r.accuracy]
        for point, record in zip(row["curve"], logged, strict=True):
            assert record.accuracy is not None
            measured = [a.received_test for a in record.accuracy.values()]
            assert point["received"] == pytest.approx(np.mean(measured), abs=1e-6)
        end = logged[-1].accuracy
        assert end is not None
        picked = {
            str(c): a.trained_test
            if (a.trained_validation or 0) > (a.received_validation or 0)
            else a.received_test
            for c, a in end.items()
        }
        assert row["chosen_by_client"] == pytest.approx(picked, abs=1e-4)


def test_a_run_that_measured_nothing_has_a_row_of_empty_values(
    info: Callable[..., RunInfo], record: Callable[..., RoundRecord]
) -> None:
    row = full_row(Run(info(), [record(0)]), "p")
    assert row["curve"] == [] and row["chosen_by_client"] == {}
    assert row["personal_weighted_mean"] is None and row["accuracy_trained_std"] is None


def test_one_run_becomes_two_rows_as_received_and_after_fine_tuning(run: Run) -> None:
    row = full_row(run, "p")
    other = {**row, "method": "other"}
    received, tuned, same = received_and_tuned([row, other], ["fedmoe"])
    assert (received["method"], tuned["method"]) == ("fedmoe as received", "fedmoe + fine-tuning")
    assert same is other
    assert (received["personal_mean"], tuned["personal_mean"]) == (0.5, 0.65)
    assert received["curve"][-1]["chosen"] == 0.5 and tuned["curve"][-1]["chosen"] == 0.65
    assert tuned["chosen_by_client"] == row["trained_by_client"]
    assert (received["global"], tuned["global"]) == (0.3, None)
    assert received["best_personal_mean"] is None  # it would be of the chosen accuracy
    for key in ("bytes_total", "seed", "partition_hash", "accuracy_received_mean"):
        assert received[key] == tuned[key] == row[key]


def test_every_key_of_the_chosen_accuracy_follows_the_kind(few_runs: list[Run]) -> None:
    for run in few_runs:
        row = full_row(run, "p")
        for kind, part in zip(("received", "trained"), received_and_tuned([row], [row["method"]]),
                              strict=True):  # fmt: skip
            for spread in ("mean", "std", "worst_tenth", "weighted_mean"):
                assert part[f"personal_{spread}"] == row[f"{KINDS[kind]}_{spread}"]


def test_published_rows_are_not_split() -> None:
    row = {"protocol": "p", "method": "fedavg", "published": True, "personal_mean": 0.9}
    assert received_and_tuned([row], ["fedavg"]) == [row]


def test_rows_come_back_as_they_were_written_one_on_a_line(
    few_runs: list[Run], tmp_path: Path
) -> None:
    rows = [full_row(run, "p") for run in few_runs]
    path = tmp_path / "new" / "rows.json"
    assert read_rows(path) == []
    write_rows(path, rows)
    assert read_rows(path) == json.loads(path.read_text()) == rows
    assert len(path.read_text().splitlines()) == len(rows) + 2
    write_rows(path, [])
    assert read_rows(path) == []


@pytest.mark.parametrize("text", ["{", '{"a": 1}', "[1]", '[{"protocol": "p"}]'])
def test_a_file_that_holds_no_rows_is_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(ValueError, match=r"rows\.json must be"):
        read_rows(tmp_path / "rows.json")
