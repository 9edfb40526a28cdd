"""The table of clients who come later: its protocols exist, and experts are told apart once."""

import json
from dataclasses import replace

from fedmoe.checkpoint import save_checkpoint
from fedmoe.experiments import unseen
from fedmoe.experiments.definition import Definition
from fedmoe.experiments.sweep import Plan, Setting, _stamp, finished_row, plan_sweep
from fedmoe.experiments.table import default_rounds, find_experiment
from fedmoe.report.log import ClientAccuracy, ClientEntry, RoundRecord, RunInfo, RunLog
from fedmoe.report.unseen import unseen_markdown
from fedmoe.state import split_state
from simulations.table_unseen import EXPERTS, TABLE, write_experts
from tests.experiments.test_unseen import HELDOUT, small

__all__ = ["small"]  # a fixture


def test_every_protocol_of_the_table_is_an_experiment():
    for s in TABLE.settings:
        assert callable(find_experiment(s.target)) and default_rounds(s.target) >= 20
    assert {s.protocol for s in TABLE.settings} >= {"heldout-weak", "heldout-average"}


def test_what_fedjets_is_held_to_is_in_the_plan(small, tmp_path):
    plan = plan_sweep([Setting("heldout-weak")], [0], tmp_path)
    assert {j.spec.method for j in plan.jobs} == HELDOUT and not plan.missing


def finished(job, e, served: float):
    """A run of the job that is over, with its last checkpoint."""
    _stamp(job)
    clients = tuple(ClientEntry(c.id, None, c.memory_bytes, 4, 2, 2) for c in e.clients)
    info = RunInfo(
        e.name, job.spec.method, job.spec.seed, job.spec.rounds, (5,), 10, e.data.partition_hash,
        {}, {}, 1, 4, clients,
    )  # fmt: skip
    log = RunLog.create(job.folder, info)
    log.append(RoundRecord(0, "train", 0.5, 10, 10, loss=1.0))
    accuracy = {c.id: ClientAccuracy(0.5, 0.5, 0.5, 0.5) for c in e.clients}
    told = {
        c.id: {"served_test": served, "full_test": 0.2, "bytes_down": 5.0, "bytes_up": 1.0}
        for c in e.unseen
    }
    log.append(RoundRecord(1, "final", 0.5, 40, 0, accuracy=accuracy, unseen=told))
    state = e.strategy.init(split_state(e.factory()), e.clients)
    save_checkpoint(job.folder / "checkpoints", 1, state)


def test_experts_are_told_from_the_last_checkpoint_and_kept_for_machines_without_it(
    small, tmp_path
):
    plan = plan_sweep([Setting("heldout-weak", 1)], [0], tmp_path / "runs")
    own = Plan([j for j in plan.jobs if j.spec.method == "fedjets"], {})
    write_experts(own, tmp_path)
    assert json.loads((tmp_path / EXPERTS).read_text()) == []  # nothing has run
    finished(own.jobs[0], unseen.heldout()["fedjets"], 0.6)
    write_experts(own, tmp_path)
    [row] = json.loads((tmp_path / EXPERTS).read_text())
    assert (row["protocol"], row["method"], row["seed"]) == ("heldout-weak", "fedjets", 0)
    assert len(row["accuracy_EC"]) == 5 and row["definition"] == own.jobs[0].definition.hash
    [job] = own.jobs
    gone = replace(job, folder=tmp_path / "nowhere")
    other = replace(gone, spec=replace(job.spec, seed=1), definition=Definition({}))
    for asked in ([gone], [other], []):  # of seed 1 alone it says nothing of seed 0
        write_experts(Plan(asked, {}), tmp_path)
        assert json.loads((tmp_path / EXPERTS).read_text()) == [row]
    changed = replace(gone, definition=Definition({"plan.lr": "1.0"}))
    write_experts(Plan([changed], {}), tmp_path)
    assert json.loads((tmp_path / EXPERTS).read_text()) == []  # what is told is of another run


def test_what_is_told_of_experts_is_in_the_order_of_the_table(tmp_path):
    told = [
        {"protocol": protocol, "method": "fedjets", "seed": seed, "definition": f"{protocol}{seed}"}
        for protocol in ("heldout-average", "heldout-weak")
        for seed in (1, 0)
    ]
    (tmp_path / EXPERTS).write_text(json.dumps(told))
    write_experts(Plan([], {}), tmp_path)
    rows = json.loads((tmp_path / EXPERTS).read_text())
    assert rows == told[::-1]


def test_the_table_shows_who_leads_on_clients_who_came_later(small, tmp_path):
    rows = []
    for seed in range(3):
        plan = plan_sweep([Setting("heldout-weak", 1)], [seed], tmp_path)
        for job in plan.jobs:
            if job.spec.method in ("fedjets", "fedavg"):
                e = unseen.heldout()[job.spec.method]
                finished(job, e, 0.7 if job.spec.method == "fedjets" else 0.5)
                rows.append(finished_row(job))
    text = unseen_markdown(rows, "fedjets")
    assert "| fedavg | **+20.00** |" in text and "| **70.0 ± 0.0** |" in text
    assert "§" not in text  # models of other sizes are what is compared here
