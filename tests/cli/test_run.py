"""Real runs of a very small experiment, through the console script in a process of its own."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.cli.conftest import Lab, make_lab

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("cli-run")]

METHODS = ("fedmoe", "fedavg")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Two methods with two seeds, run to the end."""
    lab = make_lab(tmp_path_factory.mktemp("done"))
    chosen = [x for m in METHODS for x in ("--method", m)]
    result = lab.call("run", "lab:tiny", *chosen, "--seed", "0", "--seed", "1", "--out", "runs")
    assert result.returncode == 0, result.stderr
    return lab, result


def copy(lab: Lab, folder) -> Lab:
    """The lab and its runs elsewhere, to be spoiled."""
    shutil.copytree(lab.folder, folder, dirs_exist_ok=True)
    return Lab(folder)


def test_a_run_ends_with_a_table_the_partitions_and_a_report(done):
    lab, result = done
    for text in (*METHODS, "tiny: 4 clients, 2 rounds", "partition ", "(seed 0)", "(seed 1)"):
        assert text in result.stdout
    assert "runs/report.html" in result.stdout
    assert "<html" in (lab.folder / "runs" / "report.html").read_text()
    names = {p.name for p in (lab.folder / "runs").iterdir() if p.is_dir()}
    assert names == {f"{m}-seed{s}" for m in METHODS for s in (0, 1)}


def test_progress_goes_to_stderr_a_line_for_each_run_that_ended(done):
    _, result = done
    assert sum(line.startswith("✓ ") for line in result.stderr.splitlines()) == 4
    assert "✓" not in result.stdout and "\x1b" not in result.stdout + result.stderr


def test_finished_runs_are_not_run_again_and_nothing_of_them_changes(done):
    lab, _ = done
    runs = lab.folder / "runs"
    before = {p: p.stat().st_mtime_ns for p in runs.glob("*/**/*")}
    result = lab.call("run", "lab:tiny", "--method", "fedmoe", "--out", "runs", "--json")
    assert result.returncode == 0, result.stderr
    assert "not run again: fedmoe seed 0" in result.stderr
    [row] = json.loads(result.stdout)["runs"]
    assert row["finished_before"] is True and row["finished"] is True
    assert {p: p.stat().st_mtime_ns for p in runs.glob("*/**/*")} == before


def test_json_is_all_of_stdout_although_the_experiment_talks_there_in_every_process(done, tmp_path):
    lab = copy(done[0], tmp_path)
    shutil.rmtree(tmp_path / "runs" / "fedavg-seed1")
    arguments = ("run", "lab:tiny", "--method", "fedavg", "--seed", "1", "--out", "runs", "--json")
    result = lab.call(*arguments, "--no-report", "--workers", "1", "--device", "cpu")
    assert result.returncode == 0, result.stderr
    seen = json.loads(result.stdout)
    assert seen["report"] is None
    [row] = seen["runs"]
    assert row["finished"] is True and row["finished_before"] is False and row["error"] is None
    assert 0 <= row["personal_mean"] <= 1 and row["rounds_done"] == 2
    assert result.stderr.count("the lab talks on stdout") >= 2  # here and in the worker
    # One worker or two, in another folder: the same seed ends in the same bits.
    assert row["model_hash"] == done[0].lines("runs/fedavg-seed1")[-1]["model_hash"]
    assert lab.lines("runs/fedavg-seed1") == done[0].lines("runs/fedavg-seed1")


def test_other_seeds_and_methods_end_in_other_bits(done):
    runs = [f"runs/{m}-seed{s}" for m in METHODS for s in (0, 1)]
    assert len({done[0].lines(run)[-1]["model_hash"] for run in runs}) == 4


def test_compare_inspect_and_report_read_what_a_run_wrote(done):
    lab, _ = done
    compared = lab.call("compare", "runs")
    assert compared.returncode == 0 and "Personal accuracy against fedmoe" in compared.stdout
    seen = json.loads(lab.call("inspect", "runs/fedmoe-seed0", "--json").stdout)
    checkpoint = seen["checkpoint"]
    assert checkpoint["round"] == 2 and checkpoint["matches_log"] is True
    assert checkpoint["hash"] == lab.lines("runs/fedmoe-seed0")[-1]["model_hash"]
    [model] = checkpoint["models"]
    assert len(model["experts"]) == 4
    assert sum(len(e["holders"]) for e in model["experts"]) == 4 * 2  # half of 4, 4 clients
    page = lab.folder / "one.html"
    assert lab.call("report", "runs/fedmoe-seed0", "--out", str(page)).returncode == 0
    assert page.stat().st_size > 100_000


def test_other_data_under_the_same_name_are_refused(done, tmp_path):
    lab = copy(done[0], tmp_path)
    text = (tmp_path / "lab.py").read_text()
    assert "train=40, validation=20" in text
    text = text.replace("train=40, validation=20", "train=41, validation=19")
    (tmp_path / "lab.py").write_text(text)
    before = lab.lines("runs/fedavg-seed0")
    result = lab.call("run", "lab:tiny", "--method", "fedavg", "--out", "runs")
    assert result.returncode == 2
    assert "was begun on partition" in result.stderr and "name another folder" in result.stderr
    assert lab.lines("runs/fedavg-seed0") == before


def test_a_run_that_fails_is_exit_code_1_and_the_others_finish(lab):
    reason = "RuntimeError: the aggregate fell over"
    result = lab.call("run", "lab:half_broken", "--out", "half", "--json", "--no-report")
    assert result.returncode == 1
    rows = {r["method"]: r for r in json.loads(result.stdout)["runs"]}
    assert rows["fedavg"]["finished"] is True and rows["fedavg"]["error"] is None
    assert rows["broken"]["finished"] is False and reason in rows["broken"]["error"]
    assert "1 of 2 runs failed" in result.stderr and reason in result.stderr
    assert "fedmoe resume half" in result.stderr


def test_a_run_in_which_no_client_could_train_has_failed(lab):
    result = lab.call("run", "lab:diverging", "--method", "fedavg", "--out", "div", "--quiet")
    assert result.returncode == 1
    assert "no client could be measured" in result.stderr
    assert "the training loss must be finite" in result.stderr
