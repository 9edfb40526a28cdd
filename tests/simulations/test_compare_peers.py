"""Our side of the comparison with fluke, and both sides where fluke is installed."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fedmoe.data.examples import ClientData, Examples, FederatedData
from fedmoe.experiments.experiment import Experiment
from fedmoe.experiments.run import Spec
from fedmoe.federated.fedavg import FedAvg
from fedmoe.federated.local import LocalPlan, LocalTask
from fedmoe.federated.methods.ditto import Ditto
from fedmoe.federated.rounds import Schedule
from fedmoe.nn.vision import dense_cnn
from fedmoe.report.log import ClientAccuracy, ClientEntry, RoundRecord, RunInfo, RunLog
from fedmoe.report.rows import read_rows
from fedmoe.rng import torch_generator
from fedmoe.types import ClientFailure, ClientInfo
from simulations import compare_peers
from simulations.compare_peers import (
    MEASURE,
    ORDERS,
    PEER_PYTHON,
    Case,
    batch_order,
    cases_of,
    compare,
    dense,
    fluke_name,
    row_of,
    run_peer,
    write_clients,
    write_results,
)
from simulations.peer_fluke import Accuracies, Clients

SEED, ROUNDS = 3, 2


def images(num: int, seed: int) -> Examples:
    draw = torch.Generator().manual_seed(seed)
    return Examples(torch.randn(num, 1, 28, 28, generator=draw), torch.arange(num) % 10)


def load(client: int) -> ClientData:
    return ClientData(*(images(num, 10 * client + num) for num in (7, 2, 3)))


def experiment(method: str = "fedavg") -> Experiment:
    clients = tuple(ClientInfo(c, num_examples=7) for c in range(2))
    data = FederatedData("small", clients, load, 10, "abcd")
    plan = LocalPlan(lr=0.5, batch_size=4)
    schedule = Schedule(ROUNDS, SEED)
    return Experiment("small", method, dense_cnn, FedAvg(), plan, data, clients, schedule)


def case(folder, method: str = "fedavg") -> Case:
    spec = Spec("nowhere:dense", method, SEED, ROUNDS)
    again = replace(spec, arguments={"order": 1})
    return Case("small", experiment(method), spec, folder / method, again)


class Published(nn.Module):
    """The CNN as fluke has it: same names, textbook order of operations."""

    def __init__(self) -> None:
        super().__init__()
        self._encoder, self._head = nn.Module(), nn.Module()
        self._encoder.conv1, self._encoder.conv2 = nn.Conv2d(1, 32, 5), nn.Conv2d(32, 64, 5)
        self._head.fc1, self._head.fc2 = nn.Linear(1024, 512), nn.Linear(512, 10)

    def forward(self, x_NCHW):
        for conv in (self._encoder.conv1, self._encoder.conv2):
            x_NCHW = nn.functional.max_pool2d(conv(x_NCHW).relu(), 2)
        return self._head.fc2(self._head.fc1(x_NCHW.reshape(-1, 1024)).relu())


def test_under_flukes_names_our_parameters_make_the_same_function():
    ours, theirs = dense_cnn(seed=1), Published()
    theirs.load_state_dict({fluke_name(n): t for n, t in ours.state_dict().items()})
    x_NCHW, _ = images(5, 0)
    assert sum(p.numel() for p in theirs.parameters()) == 582_026
    assert torch.allclose(ours(x_NCHW), theirs(x_NCHW), atol=1e-5)


def test_the_file_of_clients_holds_start_training_and_test_parts_and_no_validation(tmp_path):
    path = tmp_path / "clients.npz"
    write_clients(experiment(), path)
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    parts = {f"{c}.{part}.{side}" for c in (0, 1) for part in ("train", "test") for side in "xy"}
    start = {f"model.{fluke_name(n)}": t for n, t in dense_cnn().state_dict().items()}
    assert arrays.keys() == parts | start.keys() | {"0.order", "1.order"}
    assert all(np.array_equal(arrays[n], t.numpy()) for n, t in start.items())
    assert np.array_equal(arrays["1.test.x"], load(1).test.x.numpy())
    assert np.array_equal(arrays["0.train.y"], load(0).train.y.numpy())
    assert np.array_equal(arrays["1.order"], batch_order(7, ROUNDS, SEED, 1))
    assert list(path.parent.iterdir()) == [path]


class Recorder(nn.Module):
    """Writes down the numbers of the examples that it is shown, over all its copies."""

    shown: list[int] = []  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 2)

    def forward(self, x_N1):
        Recorder.shown += [int(x) for x in x_N1[:, 0]]
        return self.linear(x_N1)


@pytest.mark.parametrize("method", [LocalPlan().method, Ditto(epochs=1)])
def test_fluke_is_given_the_batches_that_our_clients_draw(method):
    numbers = Examples(torch.arange(9.0)[:, None], torch.arange(9) % 2)
    name = "ditto" if isinstance(method, Ditto) else "fedavg"
    arrays = {
        "5.train.x": numbers.x,
        "5.train.y": numbers.y,
        "5.order": torch.from_numpy(batch_order(9, ROUNDS, SEED, 5)),
    }
    job = {"method": name, "epochs": 1, "personal_epochs": 1}
    loader = Clients(job, arrays).given_order(5, batch_size=4)
    plan = LocalPlan(batch_size=4, method=method)
    for round in range(ROUNDS):
        Recorder.shown = []
        draw = torch_generator(SEED, round, 5)
        method.train(LocalTask(5, Recorder(), numbers, plan, draw, torch.device("cpu"), {}, {}))
        given = [b for _ in range(2 if name == "ditto" else 1) for b in loader]
        assert [int(x) for x_B1, _ in given for x in x_B1[:, 0]] == Recorder.shown
        assert [len(y_B) for _, y_B in given[: len(loader)]] == [4, 4, 1]
        assert all((x_B1[:, 0].long() % 2 == y_B).all() for x_B1, y_B in given)


def test_flukes_rounds_count_from_one_and_its_end_is_what_clients_receive_last():
    told = Accuracies(rounds=2, num_clients=1)
    for round, phase, accuracy in (
        (1, "pre-fit", 0.1),
        (1, "post-fit", 0.2),
        (2, "pre-fit", 0.3),
        (2, "post-fit", 0.4),
        (-1, "post-fit", 0.0),  # once more of what was measured already
        (-1, "pre-fit", 0.5),
    ):
        told.client_evaluation(round, 0, phase, {"accuracy": accuracy})
    assert told.received == [[0.1], [0.3], [0.5]] and told.trained == [[0.2], [0.4]]


def finish(case: Case, failed: tuple[ClientFailure, ...] = (), again: float = 0.0) -> None:
    """Our runs' logs: both clients at 50 % and 70 % as received, 80 % and 90 % after training; by
    so much more in the one with other batches."""
    for (spec, folder), more in zip(case.ours, (0.0, again), strict=True):
        write_log(spec, folder, failed, more)


def write_log(spec: Spec, folder, failed: tuple[ClientFailure, ...], more: float) -> None:
    clients = tuple(ClientEntry(c, None, None, 7, 2, 3) for c in range(2))
    settings = ("small", spec.method, spec.seed, ROUNDS, (), 10, "abcd")
    info = RunInfo(*settings, {"torch": "2"}, {}, 1, 4, clients)
    spec.write(folder)
    log = RunLog.create(folder, info)
    for round in range(ROUNDS + 1):
        final = round == ROUNDS
        late = 0.1 * final + more  # the closing evaluation trains once more
        accuracy = {
            0: ClientAccuracy(0.0, 0.4 + late, 0.0, 0.8 + late),
            1: ClientAccuracy(0.0, 0.6 + late, 0.0, 0.9 + late),
        }
        log.append(
            RoundRecord(
                round,
                "final" if final else "train",
                1.0,
                0,
                0,
                clients=[0, 1],
                failed=failed if round == 0 else (),
                held={0: [], 1: []},
                accuracy=accuracy,
            )
        )


def answer(case: Case, order: str, **changes: object) -> None:
    result = {
        "job": case.job(order),
        "versions": {"fluke-fl": "0.8.1"},
        "received": [[0.0, 0.0], [0.1, 0.1], [0.5, 0.65 if order == "own" else 0.7]],
        "trained": [[0.0, 0.0], [0.8, 0.95]],
    }
    case.result(order).write_text(json.dumps(result | changes))


def done(folder, failed: tuple[ClientFailure, ...] = ()) -> Case:
    """All four runs of FedAvg."""
    one = case(folder)
    finish(one, failed=failed)
    for order in ORDERS:
        answer(one, order)
    return one


def test_a_row_waits_for_all_four_runs_and_compares_what_its_method_is_judged_by(tmp_path):
    fedavg, ditto = case(tmp_path), case(tmp_path, "ditto")
    for one in (fedavg, ditto):
        assert row_of(one) is None
        finish(one, again=-0.02)
        answer(one, "own")
        assert row_of(one) is None
        answer(one, "given")
        (hidden := one.ours[1][1]).rename(one.folder / "hidden")
        assert row_of(one) is None
        (one.folder / "hidden").rename(hidden)
    row = row_of(fedavg)
    assert (row["measure"], row["partition_hash"]) == ("received", "abcd")
    assert row["ours"] == pytest.approx(0.6)  # (0.5 + 0.7) / 2, after the last round
    assert row["ours_again"] == pytest.approx(0.58)
    assert row["theirs_own"] == pytest.approx(0.575) and row["theirs_given"] == pytest.approx(0.6)
    row = row_of(ditto)
    assert row["ours"] == pytest.approx(0.85)  # (0.8 + 0.9) / 2, in the last round
    assert row["theirs_own"] == pytest.approx(0.875)

    write_results([fedavg, ditto], tmp_path)
    text = (tmp_path / "peers.md").read_text()
    assert "| fedavg | 3 | 60.00 | 58.00 | +2.00 | 57.50 | +2.50 | 60.00 | +0.00 | 0.00 |" in text
    assert "| ditto | 3 | 85.00 | 83.00 | +2.00 | 87.50 | -2.50 | 87.50 | -2.50 | 5.00 |" in text
    assert "Theirs: fluke-fl 0.8.1." in text


def test_results_keep_rows_of_earlier_calls_and_average_over_seeds(tmp_path):
    first = done(tmp_path)
    write_results([first], tmp_path)
    second = replace(first, spec=replace(first.spec, seed=4), folder=tmp_path / "another")
    finish(second)
    for order in ORDERS:
        answer(second, order, received=[[0.6, 0.8]])
    write_results([second], tmp_path)
    assert [row["seed"] for row in read_rows(tmp_path / "peers.json")] == [3, 4]
    # Points +2.5 and -10: mean -3.75, standard deviation 12.5 / sqrt(2).
    text = (tmp_path / "peers.md").read_text()
    assert "| mean of 2 | 60.00 ± 0.00 | 60.00 ± 0.00 | +0.00 ± 0.00 | 63.75 ± 8.84 | -3.75" in text


def test_rows_without_all_that_is_compared_now_are_left_out(tmp_path):
    first = done(tmp_path)
    write_results([first], tmp_path)
    path = tmp_path / "peers.json"
    [row] = json.loads(path.read_text())
    del row["ours_again"], row["by_client"]["ours_again"]
    path.write_text(json.dumps([row]))
    write_results([], tmp_path)
    assert read_rows(path) == []


def test_another_order_has_the_same_start_and_clients_and_other_batches(fashion_mnist):
    first, second = (
        dense(3, 2, partition="pathological", share=0.02, order=order)["fedper"]
        for order in (0, 1)
    )
    a, b = first.factory().state_dict(), second.factory().state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert first.data.partition_hash == second.data.partition_hash
    drawn = [batch_order(9, 2, e.schedule.seed, 0) for e in (first, second)]
    assert first.schedule.seed == 3 and not np.array_equal(*drawn)


def test_a_result_of_another_job_does_not_count(tmp_path):
    one = done(tmp_path)
    faster = replace(one, experiment=replace(one.experiment, plan=LocalPlan(lr=0.25)))
    assert row_of(one) is not None and row_of(faster) is None


def test_a_run_that_lost_a_client_is_not_compared(tmp_path):
    one = done(tmp_path, failed=(ClientFailure(1, "its loss is not finite"),))
    with pytest.raises(ValueError, match="client 1 has not: its loss is not finite"):
        row_of(one)


def test_fluke_runs_once_and_its_failure_is_told(tmp_path, monkeypatch):
    one, python = case(tmp_path), tmp_path / "python"
    one.folder.mkdir()
    monkeypatch.setattr(compare_peers, "PEER_PYTHON", python)
    canned = tmp_path / "canned.json"
    canned.write_text(json.dumps({"job": one.job("own")}))
    for script in (f'cp {canned} "$3"', "echo no such operator >&2; exit 1"):
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
        run_peer(one, "own")  # the second time its result is there
    assert json.loads((one.folder / "fluke-own.job").read_text()) == one.job("own")
    with pytest.raises(RuntimeError, match=r"fluke-given.job: fluke failed\nno such operator"):
        run_peer(one, "given")


def test_other_settings_have_other_folders(tmp_path, monkeypatch, fashion_mnist):
    def folders():
        cases = cases_of(["published-fifth-pathological"], MEASURE, [0], 2, 0.02, tmp_path)
        return [c.folder for c in cases]

    first = folders()
    monkeypatch.setattr(compare_peers, "PULL", 0.5)
    again = folders()
    assert first[:2] == again[:2] and first[2] != again[2]  # only Ditto has the pull


@pytest.mark.slow
def test_ours_and_flukes_methods_learn_the_same_from_the_same_batches(
    tmp_path, monkeypatch, fashion_mnist
):
    if not PEER_PYTHON.exists():
        pytest.skip("there is no .venv-peers here (make peers)")
    small = {"small": {"partition": "pathological", "share": 0.02}}
    monkeypatch.setattr(compare_peers, "PROTOCOLS", small)
    methods = ["fedper", "ditto"]  # whose averages are FedAvg's
    cases = cases_of(["small"], methods, [0], 2, 0.02, tmp_path / "runs")
    assert not compare(cases, 1, place=tmp_path)
    rows = read_rows(tmp_path / "peers.json")
    assert [row["method"] for row in rows] == methods
    for row in rows:
        by_client = row["by_client"]
        assert len(by_client["theirs_own"]) == 20
        assert by_client["ours"] == pytest.approx(by_client["theirs_given"], abs=1e-4)
