"""The scripts that make tables, on runs made by hand."""

from pathlib import Path

import pytest

from fedmoe.report.log import ClientAccuracy, ClientEntry, RoundRecord, Run, RunInfo, RunLog
from simulations.ablate_choice import shared_experts
from simulations.table_fashion import PROTOCOLS, jobs_of, write_results
from simulations.tune_fashion import validation_accuracy


def info(method: str = "fedmoe", seed: int = 0) -> RunInfo:
    clients = tuple(ClientEntry(c, "ab"[c % 2], None, 4, 2, 2) for c in range(4))
    return RunInfo("domains", method, seed, 1, (4,), 10, "abcd", {}, {}, 100, 400, clients)


def final(held: dict[int, list[list[int]]], accuracy: ClientAccuracy) -> RoundRecord:
    return RoundRecord(1, "final", 0.5, 40, 0, held=held, accuracy=dict.fromkeys(held, accuracy))


HELD = {0: [[0, 1]], 1: [[1, 2]], 2: [[0, 1]], 3: [[2]]}
ACCURACY = ClientAccuracy(0.5, 0.4, 0.75, 0.6)


def test_an_expert_of_clients_in_two_domains_counts_as_shared():
    run = Run(info(), [final(HELD, ACCURACY)])
    assert shared_experts(run) == 1  # expert 1; 0 is domain a's alone, 2 is b's, 3 nobody's


def test_tuning_looks_at_validation_data_and_takes_the_better_of_the_two(tmp_path):
    log = RunLog.create(tmp_path, info())
    log.append(RoundRecord(0, "train", 0.5, 10, 10, loss=1.0))
    log.append(final(HELD, ACCURACY))
    assert validation_accuracy(tmp_path) == 0.75


def test_the_table_names_every_protocol_method_and_seed_once():
    jobs = jobs_of(["domains"], [0, 1], Path("runs"), ["fedmoe", "local"])
    assert len({folder for _, folder in jobs}) == len(jobs) == 4
    assert set(PROTOCOLS) > {"domains"}


@pytest.mark.parametrize("seeds", [[0], [0, 1]])
def test_results_hold_the_finished_runs_and_pair_methods_by_seed(tmp_path, seeds):
    jobs = jobs_of(["domains"], seeds, tmp_path / "runs", ["fedmoe", "local"])
    better = ClientAccuracy(0.5, 0.5, 0.75, 0.7 + 0.0)
    for spec, folder in jobs:
        log = RunLog.create(folder, info(spec.method, spec.seed))
        log.append(RoundRecord(0, "train", 0.5, 10, 10, loss=1.0))
        log.append(final(HELD, better if spec.method == "fedmoe" else ACCURACY))
    write_results(jobs, tmp_path / "results")
    text = (tmp_path / "results" / "fashion.md").read_text()
    assert "70.0" in text and "60.0" in text
    assert ("fedmoe less local: +10.00 points" in text) == (len(seeds) == 2)
