"""A sweep: what is done is not done again, what other settings made is neither shown nor lost."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fedmoe.experiments import sweep
from fedmoe.experiments.definition import Definition
from fedmoe.experiments.run import Spec
from fedmoe.experiments.study import RunProgress, alone
from fedmoe.experiments.sweep import (
    Job,
    Plan,
    Setting,
    finished_row,
    open_root,
    plan_sweep,
    read_settings,
    run_sweep,
)
from fedmoe.experiments.table import UnknownNameError
from fedmoe.report.log import (
    ClientAccuracy,
    ClientEntry,
    RoundRecord,
    RunInfo,
    RunLog,
    read_run,
)
from fedmoe.report.rows import full_row, read_rows, write_rows

KEYS = [("p", m, s) for m in ("a", "b") for s in (0, 1)]


def job(root: Path, method: str, seed: int, lr: str = "0.1", **more: str) -> Job:
    """A job of protocol p; `more` are settings at their defaults."""
    spec = Spec("tiny:tiny", method, seed, 1)
    folder = root / "p" / f"{method}-seed{seed}"
    made = Definition({"method": method, "seed": str(seed), "lr": lr} | more, frozenset(more))
    return Job("p", spec, folder, made, "tiny", f"part{seed}", ((0, 5), (1, None)), False)


def plan_of(root: Path, lr: str = "0.1", **more: str) -> Plan:
    return Plan([job(root, method, seed, lr, **more) for _, method, seed in KEYS], {})


def info_of(own: Job) -> RunInfo:
    clients = tuple(ClientEntry(c, None, memory, 4, 2, 2) for c, memory in own.memory)
    spec = own.spec
    return RunInfo(
        own.experiment, spec.method, spec.seed, spec.rounds, (4,), 3, own.partition_hash, {}, {},
        10, 40, clients,
    )  # fmt: skip


def write_run(own: Job, accuracy: float = 0.5, info: RunInfo | None = None) -> None:
    """A finished run, as a runner leaves it in the job's folder."""
    own.spec.write(own.folder)
    log = RunLog.create(own.folder, info or info_of(own))
    log.append(RoundRecord(0, "train", 0.5, 10, 10, clients=(0, 1), loss=1.0))
    measured = dict.fromkeys((0, 1), ClientAccuracy(0.5, accuracy))
    log.append(RoundRecord(1, "final", 0.5, 40, 0, clients=(0, 1), accuracy=measured))


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """In place of a study: every run is finished at once, and noted here."""
    found: list[tuple[str, int]] = []

    def study(jobs, workers, *, watch, every_s):
        progress = []
        for spec, folder in jobs:
            found.append((spec.method, spec.seed))
            write_run(job(folder.parents[1], spec.method, spec.seed), 0.25)
            progress.append(RunProgress(spec, folder, 2, 50, 0.25, True))
            watch(progress)
        return progress

    monkeypatch.setattr(sweep, "run_study", study)
    return found


def test_all_runs_of_a_new_sweep_are_run_and_their_rows_kept_in_order(ran, tmp_path):
    results = tmp_path / "results" / "t.json"
    seen = []
    undone = run_sweep(plan_of(tmp_path), tmp_path, results, after=seen.append, say=lambda _: None)
    rows = read_rows(results)
    assert undone == {} and [(r["protocol"], r["method"], r["seed"]) for r in rows] == KEYS
    assert len(ran) == 4 and [len(r) for r in seen] == [0, 1, 2, 3, 4] and seen[-1] == rows


def test_a_row_is_that_of_the_log_with_what_the_run_was_made_of(ran, tmp_path):
    own = job(tmp_path, "a", 1)
    assert finished_row(own) is None
    run_sweep(Plan([own], {}), tmp_path, tmp_path / "t.json", say=lambda _: None)
    row = finished_row(own)
    assert row is not None and read_rows(tmp_path / "t.json") == [row]
    for key, value in full_row(read_run(own.folder), "p").items():
        assert row[key] == value
    day = time.strftime("%Y-%m-%d", time.gmtime((own.folder / "rounds.jsonl").stat().st_mtime))
    assert (row["definition"], row["date"]) == (own.definition.hash, day)
    assert row["settings"] == own.definition.settings and row["control"] is False


def test_what_is_finished_is_not_run_again(ran, tmp_path):
    for _ in range(2):
        run_sweep(plan_of(tmp_path), tmp_path, tmp_path / "t.json", say=lambda _: None)
    assert len(ran) == 4


def test_a_committed_row_counts_as_done_on_a_machine_without_its_run(ran, tmp_path):
    results = tmp_path / "t.json"
    run_sweep(plan_of(tmp_path / "old"), tmp_path / "old", results, say=lambda _: None)
    before = read_rows(results)
    run_sweep(plan_of(tmp_path / "new"), tmp_path / "new", results, say=lambda _: None)
    assert len(ran) == 4 and read_rows(results) == before


def test_a_row_of_another_table_counts_too(ran, tmp_path):
    other, results = tmp_path / "other.json", tmp_path / "t.json"
    run_sweep(plan_of(tmp_path / "a"), tmp_path / "a", other, say=lambda _: None)
    plan = plan_of(tmp_path / "b")
    run_sweep(plan, tmp_path / "b", results, others=[other], say=lambda _: None)
    assert len(ran) == 4 and read_rows(results) == read_rows(other)


def test_what_other_settings_made_is_dropped_set_aside_and_run_again(ran, tmp_path):
    results, said = tmp_path / "t.json", []
    run_sweep(plan_of(tmp_path), tmp_path, results, say=said.append)
    plan = plan_of(tmp_path, lr="0.2")
    shown = []
    run_sweep(plan, tmp_path, results, methods=["a"], after=shown.append, say=said.append)
    assert ran[4:] == [("a", 0), ("a", 1)]
    assert shown[0] == []  # nothing of the old settings, not for a moment
    hashes = {job.key: job.definition.hash for job in plan.jobs}
    assert {r["method"]: r["definition"] for r in read_rows(results)} == {"a": hashes["p", "a", 1]}
    aside = tmp_path / "superseded" / "p" / "a-seed0-1"
    assert read_settings(aside) == job(tmp_path, "a", 0).definition.settings
    assert f"set aside {tmp_path / 'p' / 'a-seed0'}: made under another lr" in said
    assert any("p b seed 1" in line for line in said if line.startswith("dropped from t.json"))


def test_a_new_setting_at_its_default_speaks_against_nothing(ran, tmp_path):
    results = tmp_path / "t.json"
    run_sweep(plan_of(tmp_path), tmp_path, results, say=lambda _: None)
    for root in (tmp_path, tmp_path / "without-runs"):
        plan = plan_of(root, clip="None")
        run_sweep(plan, root, results, say=lambda _: None)
        today = [job.definition.hash for job in plan.jobs]
        assert [row["definition"] for row in read_rows(results)] == today
    assert len(ran) == 4


def test_trusted_runs_and_rows_are_taken_as_made_by_todays_settings(ran, tmp_path):
    results = tmp_path / "t.json"
    run_sweep(plan_of(tmp_path), tmp_path, results, say=lambda _: None)
    for root in (tmp_path, tmp_path / "without-runs"):
        plan = plan_of(root, lr=f"renamed{root.name}")
        run_sweep(plan, root, results, trust=True, say=lambda _: None)
        today = [job.definition.hash for job in plan.jobs]
        assert [row["definition"] for row in read_rows(results)] == today
    assert len(ran) == 4


def test_trust_goes_as_far_as_the_log_agrees(ran, tmp_path):
    results = tmp_path / "t.json"
    run_sweep(plan_of(tmp_path), tmp_path, results, say=lambda _: None)
    elsewhere = [replace(j, partition_hash="elsewhere") for j in plan_of(tmp_path, "0.2").jobs]
    run_sweep(Plan(elsewhere[:1], {}), tmp_path, results, trust=True, say=lambda _: None)
    assert len(ran) == 5


def test_again_runs_what_is_done_and_keeps_the_earlier_run_aside(ran, tmp_path):
    results = tmp_path / "t.json"
    run_sweep(plan_of(tmp_path), tmp_path, results, say=lambda _: None)
    plan = plan_of(tmp_path)
    run_sweep(plan, tmp_path, results, methods=["b"], again=True, say=lambda _: None)
    assert ran[4:] == [("b", 0), ("b", 1)] and len(read_rows(results)) == 4
    assert (tmp_path / "superseded" / "p" / "b-seed1-1" / "run.json").exists()


def test_a_run_that_no_sweep_began_is_taken_over_if_its_log_agrees(ran, tmp_path):
    plan, said = plan_of(tmp_path), []
    write_run(plan.jobs[0], 0.75)
    other = replace(info_of(plan.jobs[1]), partition_hash="elsewhere")
    write_run(plan.jobs[1], 0.75, other)
    run_sweep(plan, tmp_path, tmp_path / "t.json", methods=["a"], say=said.append)
    assert ran == [("a", 1)]
    assert [row["personal_mean"] for row in read_rows(tmp_path / "t.json")] == [0.75, 0.25]
    assert any(line.startswith("taken over") and "a-seed0" in line for line in said)
    assert f"set aside {plan.jobs[1].folder}: its log is of another run" in said
    assert read_settings(plan.jobs[0].folder) == plan.jobs[0].definition.settings


@pytest.mark.parametrize(
    "change",
    [
        {"experiment": "other"},
        {"partition_hash": "other"},
        {"memory": ((0, 6), (1, None))},
        {"spec": Spec("tiny:tiny", "a", 0, 2)},
        {"spec": Spec("tiny:tiny", "a", 1, 1)},
    ],
)
def test_a_log_agrees_in_all_that_it_says(change, tmp_path):
    own = job(tmp_path, "a", 0)
    assert own.agrees(info_of(own)) and not replace(own, **change).agrees(info_of(own))


def test_rows_that_this_sweep_does_not_speak_of_stay(ran, tmp_path):
    results = tmp_path / "t.json"
    published = {"protocol": "p", "method": "a", "published": True, "personal_mean": 0.9}
    base = {"protocol": "p", "method": "gone", "seed": 0, "settings": {}}
    elsewhere = {**base, "protocol": "q"}
    later = {**base, "seed": 7}
    write_rows(results, [{"protocol": "p", "method": "a", "seed": 0}, base, elsewhere, later,
                         published])  # fmt: skip
    run_sweep(plan_of(tmp_path), tmp_path, results, say=lambda _: None)
    rows = read_rows(results)
    # Of the old ones: no row without settings, none of a method that is no more.
    assert rows[0] == published and later in rows and elsewhere in rows and base not in rows
    assert len(rows) == 4 + 3


def test_rows_of_another_process_are_not_lost(ran, tmp_path):
    results, plan = tmp_path / "t.json", plan_of(tmp_path)
    other = job(tmp_path / "elsewhere", "b", 1)

    def after(rows):
        # While this one works, another process finishes b-seed1.
        if len(rows) == 1:
            write_rows(results, [*rows, row])

    write_run(other)
    (other.folder / "definition.json").write_text(
        json.dumps({"settings": dict(other.definition.settings)})
    )
    row = finished_row(other)
    run_sweep(plan, tmp_path, results, methods=["a"], after=after, say=lambda _: None)
    assert [(r["method"], r["seed"]) for r in read_rows(results)] == [("a", 0), ("a", 1), ("b", 1)]


def test_a_run_that_another_process_holds_is_left_to_it(ran, tmp_path):
    plan = plan_of(tmp_path)
    write_run(plan.jobs[0])
    with alone(plan.jobs[0].folder):
        undone = run_sweep(
            plan, tmp_path, tmp_path / "t.json", methods=["a"], again=True, say=lambda _: None
        )
    assert ran == [("a", 1)]
    assert list(undone) == [plan.jobs[0].folder]
    assert "being run by another process" in undone[plan.jobs[0].folder]


@pytest.mark.parametrize(
    "text, why",
    [
        ('{"format": 2}', "format 2, and this fedmoe reads format 1 only"),
        ('{"format": "1"}', "format '1'"),
        ("{", "damaged"),
        ("[]", "damaged"),
    ],
)
def test_a_sweep_of_another_version_is_refused(tmp_path, text, why):
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(ValueError, match=why):
        open_root(tmp_path)


def test_the_folder_of_a_run_is_no_sweep(tmp_path):
    Spec("tiny:tiny", "a", 0, 1).write(tmp_path)
    with pytest.raises(ValueError, match="is the folder of one run"):
        open_root(tmp_path)


def test_damaged_files_of_a_run_are_told_and_the_others_run(ran, tmp_path):
    plan = plan_of(tmp_path)
    for own in plan.jobs[:2]:
        write_run(own)
    (plan.jobs[0].folder / "definition.json").write_text("{")
    (plan.jobs[1].folder / "run.json").write_text("{")
    undone = run_sweep(plan, tmp_path, tmp_path / "t.json", say=lambda _: None)
    assert set(undone) == {own.folder for own in plan.jobs[:2]} and len(ran) == 2
    assert "definition.json is damaged" in undone[plan.jobs[0].folder]


def test_a_plan_has_every_method_and_seed_and_says_what_cannot_be_made(tiny_target, tmp_path):
    settings = [Setting(tiny_target, 2, label="tiny"), Setting("no-such"), Setting(tiny_target)]
    plan = plan_sweep(settings, [0, 1], tmp_path)
    assert len({own.folder for own in plan.jobs}) == len(plan.jobs) == 2 * 2 * 3
    assert [own.spec.rounds for own in plan.jobs] == [2] * 6 + [3] * 6  # 3 is its own number
    assert {own.folder.parent for own in plan.jobs} == {tmp_path / "tiny", tmp_path / "tiny.tiny"}
    assert list(plan.missing) == ["no-such"]
    assert "no experiment is called 'no-such'" in plan.missing["no-such"]


def test_a_method_that_no_protocol_has_is_an_error(tmp_path):
    assert len(plan_of(tmp_path).of_methods(["b"])) == 2
    with pytest.raises(UnknownNameError, match="must be among a, b, got 'c'"):
        plan_of(tmp_path).of_methods(["c"])


def test_a_plan_of_some_methods_keeps_rows_of_no_others(ran, tmp_path):
    whole, some = tmp_path / "whole.json", tmp_path / "some.json"
    run_sweep(plan_of(tmp_path), tmp_path, whole, say=lambda _: None)
    plan = plan_of(tmp_path).only(["b", "of another protocol"])
    run_sweep(plan, tmp_path, some, others=[whole], say=lambda _: None)
    assert [row["method"] for row in read_rows(some)] == ["b", "b"] and len(ran) == 4


SWEEP = """
import sys
from pathlib import Path
from fedmoe.experiments.sweep import Setting, plan_sweep, run_sweep

if __name__ == "__main__":
    root = Path(sys.argv[1])
    plan = plan_sweep([Setting("tiny:tiny", 4)], [0], root)
    undone = run_sweep(plan, root, root / "t.json", workers=1, every_s=0.05)
    raise SystemExit(len(undone))
"""


@pytest.mark.slow
def test_a_sweep_that_was_killed_goes_on_and_gives_the_same_rows(tiny_target, tmp_path):
    script = tmp_path / "go.py"
    script.write_text(SWEEP)
    command = [sys.executable, str(script)]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert subprocess.run([*command, whole], env=os.environ, check=False).returncode == 0

    process = subprocess.Popen([*command, killed], env=os.environ, start_new_session=True)
    deadline = time.monotonic() + 600
    while not list(killed.glob("tiny.tiny/fedavg-seed0/checkpoints/round-*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = read_rows(killed / "t.json")
    assert len(done) < 3
    assert subprocess.run([*command, killed], env=os.environ, check=False).returncode == 0

    changing = {"seconds", "seconds_exploring", "date"}
    first, second = (
        [{k: v for k, v in row.items() if k not in changing} for row in read_rows(root / "t.json")]
        for root in (whole, killed)
    )
    assert first == second and len(first) == 3


@pytest.mark.slow
def test_two_processes_share_a_sweep_and_no_run_is_made_twice(tiny_target, tmp_path):
    script = tmp_path / "go.py"
    script.write_text(SWEEP)
    root = tmp_path / "shared"
    pair = [
        subprocess.Popen([sys.executable, str(script), root], env=os.environ, text=True,
                         stdout=subprocess.PIPE)
        for _ in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=900)[0] for process in pair]
    again = subprocess.run([sys.executable, str(script), root], env=os.environ, check=False)
    assert again.returncode == 0 and len(read_rows(root / "t.json")) == 3
    assert "set aside" not in "".join(said)
    rounds = [
        [r.round for r in read_run(folder).rounds]
        for folder in sorted((root / "tiny.tiny").iterdir())
    ]
    assert rounds == [[0, 1, 2, 3, 4]] * 3
