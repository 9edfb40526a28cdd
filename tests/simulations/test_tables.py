"""The scripts that make tables, on runs made by hand."""

import sys
from pathlib import Path

import pytest
import torch

from fedmoe.data.examples import ClientData, Examples
from fedmoe.experiments import sweep
from fedmoe.experiments.study import RunProgress
from fedmoe.experiments.sweep import Setting
from fedmoe.experiments.table import find_experiment
from fedmoe.federated.rounds import Schedule
from fedmoe.report.log import ClientAccuracy, ClientEntry, RoundRecord, RunInfo, RunLog
from fedmoe.report.rows import read_rows
from simulations import table_conditions, table_fashion, table_personal
from simulations.published import LEADERBOARD, leaderboard_rows
from simulations.tables import TABLES, Table, carry_out, options_of, settings_of
from simulations.tune_fashion import validation_accuracy
from tests.tiny import experiment


def info(method: str = "fedmoe", seed: int = 0) -> RunInfo:
    clients = tuple(ClientEntry(c, "ab"[c % 2], None, 4, 2, 2) for c in range(4))
    return RunInfo("domains", method, seed, 1, (4,), 10, "abcd", {}, {}, 100, 400, clients)


def final(held: dict[int, list[list[int]]], accuracy: ClientAccuracy) -> RoundRecord:
    return RoundRecord(1, "final", 0.5, 40, 0, held=held, accuracy=dict.fromkeys(held, accuracy))


HELD = {0: [[0, 1]], 1: [[1, 2]], 2: [[0, 1]], 3: [[2]]}
ACCURACY = ClientAccuracy(0.5, 0.4, 0.75, 0.6)


def test_tuning_looks_at_validation_data_and_takes_the_better_of_the_two(tmp_path):
    log = RunLog.create(tmp_path, info())
    log.append(RoundRecord(0, "train", 0.5, 10, 10, loss=1.0))
    log.append(final(HELD, ACCURACY))
    assert validation_accuracy(tmp_path) == 0.75


TINY = Table("tiny", "Tiny methods", (Setting("tiny:tiny", 1), Setting("nowhere")), page=True)


def finished_runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """In place of a study: every run is finished at once; the better method is fedmoe."""
    ran: list[str] = []

    def study(jobs, workers, *, watch, every_s):
        progress = []
        for spec, folder in jobs:
            ran.append(folder.name)
            log = RunLog.create(folder, info(spec.method, spec.seed))
            log.append(RoundRecord(0, "train", 0.5, 10, 10, loss=1.0))
            better = ClientAccuracy(0.5, 0.5, 0.75, 0.7)
            log.append(final(HELD, better if spec.method == "fedmoe" else ACCURACY))
            progress.append(RunProgress(spec, folder, 2, 60, 0.5, True))
        watch(progress)
        return progress

    monkeypatch.setattr(sweep, "run_study", study)
    return ran


@pytest.fixture
def tiny_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "experiments"))
    sys.modules.pop("tiny", None)


@pytest.mark.parametrize("seeds", ["0", "0 1 2"])
def test_a_table_is_run_and_written_and_says_what_it_lacks(
    tiny_target, tmp_path, monkeypatch, capsys, seeds
):
    ran = finished_runs(monkeypatch)
    command = ["--runs", str(tmp_path / "runs"), "--seeds", *seeds.split()]
    options = options_of(TINY, None).parse_args(command)
    # nowhere cannot be run
    assert carry_out(TINY, TINY.settings, options, tmp_path / "results") == 1
    assert len(ran) == 3 * len(options.seeds)
    assert "cannot run nowhere: no experiment is called 'nowhere'" in capsys.readouterr().out
    text = (tmp_path / "results" / "tiny.md").read_text()
    assert text.startswith("# Tiny methods\n") and "70.0" in text and "60.0" in text
    assert "Not in this table: nowhere (no experiment is called" in text
    assert ("| local | **+10.00** | +10.00 to +10.00 |" in text) == (len(options.seeds) == 3)
    assert len(read_rows(tmp_path / "results" / "tiny.json")) == len(ran)
    assert "Tiny methods" in (tmp_path / "results" / "tiny.html").read_text()
    assert carry_out(TINY, TINY.settings, options, tmp_path / "results") == 1
    assert len(ran) == 3 * len(options.seeds)  # as before


def test_a_table_has_its_own_methods_alone(tiny_target, tmp_path, monkeypatch):
    ran = finished_runs(monkeypatch)
    table = Table("tiny", "Tiny", (Setting("tiny:tiny", 1),), ("fedmoe", "of another protocol"))
    options = options_of(table, None).parse_args(["--runs", str(tmp_path / "runs")])
    assert carry_out(table, table.settings, options, tmp_path / "results") == 0
    assert ran == ["fedmoe-seed0", "fedmoe-seed1", "fedmoe-seed2"]


def test_a_folder_of_another_version_or_an_unknown_method_stops_a_table_at_once(
    tiny_target, tmp_path, monkeypatch, capsys
):
    ran = finished_runs(monkeypatch)
    options = options_of(TINY, None).parse_args(["--runs", str(tmp_path), "--methods", "nobody"])
    assert carry_out(TINY, TINY.settings, options, tmp_path / "results") == 2
    assert "methods must be among fedavg, fedmoe, local, got 'nobody'" in capsys.readouterr().err
    (tmp_path / "sweep.json").write_text('{"format": 99}')
    assert carry_out(TINY, TINY.settings, options, tmp_path / "results") == 2
    assert "holds a sweep of format 99" in capsys.readouterr().err and ran == []


@pytest.mark.parametrize("module", [table_fashion, table_personal])
def test_every_table_has_its_protocols_seeds_and_file(module):
    options = options_of(module.TABLE, None).parse_args([])
    assert options.protocols[: len(module.PROTOCOLS)] == list(module.PROTOCOLS)
    assert options.seeds == [0, 1, 2]
    assert module.TABLE.name in TABLES and set(module.PROTOCOLS) >= {"domains"}


def test_every_condition_has_the_methods_that_its_table_asks_for():
    for setting in table_conditions.TABLE.settings:
        methods = find_experiment(setting.target)(seed=0, rounds=1)
        unknown = set(setting.methods) - methods.keys()
        assert unknown <= {"fedmoe-published"}  # needs clients that hold the full model
    assert table_conditions.TABLE.name in TABLES


def test_the_quick_table_has_the_same_methods_on_fewer_clients(tiny_target):
    quick = table_personal.quickened(Setting("tiny:tiny", label="small"))
    assert (quick.protocol, quick.rounds) == ("small", 2)
    few = find_experiment(quick.target)(seed=0, rounds=2, **quick.arguments)
    whole = find_experiment("tiny:tiny")(seed=0, rounds=2)
    assert few.keys() == whole.keys()
    for method, e in few.items():
        assert e.clients == whole[method].clients[: table_personal.QUICK_CLIENTS]
        assert e.schedule.rounds == 2 and e.plan == whole[method].plan
        assert e.data.partition_hash != whole[method].data.partition_hash


@pytest.mark.parametrize("count, kept", [(0, 0), (59, 59), (61, 31), (600, 60)])
def test_the_quick_table_keeps_few_examples_from_all_over_each_part(count, kept):
    part = Examples(torch.arange(count).float(), torch.arange(count))
    data = table_personal._few_examples(ClientData(part, part, part))
    for thinned in (data.train, data.validation, data.test):
        assert len(thinned.y) == kept <= table_personal.QUICK_EXAMPLES
        assert torch.equal(thinned.x, thinned.y.float())
        assert kept == 0 or thinned.y[-1] >= 0.9 * (count - 1)


def test_protocols_are_told_by_the_tables_own_settings_or_by_any_experiments_name():
    table = Table("tiny", "Tiny", (Setting("tiny:tiny", 1, label="small"),))
    assert settings_of(table, ["small", "domains"]) == [*table.settings, Setting("domains")]


def test_no_more_clients_a_round_than_the_quick_table_has():
    whole = experiment(schedule=Schedule(2, clients_per_round=4), clients=experiment().clients[:3])
    quick = table_personal._made_small(whole)
    assert quick.schedule.clients_per_round == 3


def test_a_setting_may_have_methods_of_its_own(tiny_target, tmp_path):
    one = Setting("tiny:tiny", 1, methods=("local", "of another protocol"))
    plan = sweep.plan_sweep([one, Setting("tiny:tiny", 1, label="all")], [0], tmp_path)
    assert [j.spec.method for j in plan.jobs] == ["local", "fedmoe", "fedavg", "local"]
    assert table_personal.quickened(one).methods == one.methods


def test_runs_have_the_trainer_that_is_asked_for_where_it_can_train_them(
    tiny_target, tmp_path, monkeypatch
):
    setting = Setting("tiny:tiny", 1)
    asked = []

    def supported(model, plan, trainer):
        asked.append(trainer)
        return "not this one" if len(asked) == 2 else None

    monkeypatch.setattr(sweep, "supported", supported)
    plan = sweep.plan_sweep([setting], [0], tmp_path, "compiled")
    assert [j.spec.trainer for j in plan.jobs] == ["compiled", "one-by-one", "compiled"]
    monkeypatch.undo()
    plain = sweep.plan_sweep([setting], [0], tmp_path)
    assert {j.spec.trainer for j in plain.jobs} == {"one-by-one"}


def test_published_figures_stand_in_the_file_and_in_the_table_and_are_not_judged(
    tiny_target, tmp_path, monkeypatch
):
    finished_runs(monkeypatch)
    rows = leaderboard_rows({"dirichlet": "tiny"})
    table = Table("tiny", "Tiny", (Setting("tiny:tiny", 1, label="tiny"),), published=tuple(rows))
    options = options_of(table, None).parse_args(["--runs", str(tmp_path / "runs")])
    for _ in range(2):  # they stand there once
        assert carry_out(table, table.settings, options, tmp_path) == 0
        kept = [r for r in read_rows(tmp_path / "tiny.json") if r.get("published")]
        assert kept == rows
    text = (tmp_path / "tiny.md").read_text()
    assert "| FedPer (2000 rounds)† | 1 | - |" in text and " 97.4 |" in text
    assert "PFLlib's leaderboard" in text and "**fedmoe" not in text


def test_the_published_rows_are_those_of_the_leaderboard():
    rows = leaderboard_rows({"pathological": "a", "dirichlet": "b"})
    assert len(rows) == 2 * len(LEADERBOARD)
    figures = {(r["protocol"], r["method"]): r["personal_weighted_mean"] for r in rows}
    assert figures["a", "FedAvg (2000 rounds)"] == 0.8041
    assert figures["b", "Ditto (2000 rounds)"] == 0.9747
    assert all(r["published"] and r["source"] and r["rounds"] == 2000 for r in rows)
    told = {r["protocol"] for r in table_personal.TABLE.published}
    assert told <= {s.protocol for s in table_personal.TABLE.settings}
