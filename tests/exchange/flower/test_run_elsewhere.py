"""`run_experiment` where clients work in other processes: see tests/experiments for the rest."""

from dataclasses import replace

import pytest

from fedmoe.exchange.inprocess import in_process
from fedmoe.experiments.run import run_experiment
from fedmoe.report.log import read_run
from tests.tiny import client_data, experiment


def elsewhere(made):
    return lambda told: in_process(
        made.factory, client_data, made.plan, made.schedule.seed, progress=told
    )


@pytest.mark.parametrize("error", [OSError, ValueError, KeyError])
def test_a_server_needs_no_data_of_its_clients(tmp_path, error):
    def load(client):
        raise error(f"client {client}'s data are not here")

    made = experiment()
    blind = replace(made, data=replace(made.data, load=load))
    digest = run_experiment(blind, tmp_path / "blind", exchange=elsewhere(made))
    assert digest == run_experiment(made, tmp_path / "here")
    log, seen = read_run(tmp_path / "blind"), read_run(tmp_path / "here")
    assert [c.num_train for c in log.info.clients] == [12] * 4
    assert [c.num_test for c in log.info.clients] == [0] * 4
    for blind_round, seen_round in zip(log.rounds, seen.rounds, strict=True):
        assert blind_round.accuracy == seen_round.accuracy
        assert blind_round.model_hash == seen_round.model_hash
        assert blind_round.global_accuracy is None and not blind_round.memory_bytes
    assert seen.rounds[-1].global_accuracy is not None


def test_a_server_that_has_the_data_logs_as_in_process(tmp_path):
    made = experiment()
    told = []
    run_experiment(made, tmp_path / "a", exchange=elsewhere(made), on_client=told.append)
    run_experiment(made, tmp_path / "b")
    assert told == [0, 1, 2, 3] * 4
    first, second = (read_run(tmp_path / x) for x in "ab")
    assert first.info == second.info
    assert [replace(r, seconds=0, memory_bytes={}) for r in first.rounds] == [
        replace(r, seconds=0, memory_bytes={}) for r in second.rounds
    ]


def test_the_bytes_that_really_went_are_logged(tmp_path):
    counts = iter([(10, 1), (20, 2), (30, 3), (40, 4)])
    made = experiment()
    run_experiment(
        made, tmp_path, exchange=elsewhere(made), traffic=lambda: next(counts)
    )
    log = read_run(tmp_path)
    assert [(r.bytes_down, r.bytes_up) for r in log.rounds] == [(10, 1), (20, 2), (30, 3), (40, 4)]
