"""compare and report, on made-up runs."""

from __future__ import annotations

import json

import pytest

from tests.cli.conftest import write_run


@pytest.fixture
def runs(tmp_path):
    for seed, (ours, theirs) in enumerate([(0.8, 0.6), (0.9, 0.6), (0.85, 0.65)]):
        write_run(tmp_path, "fedmoe", seed, accuracy=ours)
        write_run(tmp_path, "fedavg", seed, accuracy=theirs)
    return tmp_path


def test_the_table_has_every_method_and_the_paired_difference(fedmoe, runs):
    result = fedmoe("compare", runs, "--against", "fedavg")
    assert result.exit_code == 0
    assert "85.0" in result.stdout and "61.7" in result.stdout
    [line] = [x for x in result.stdout.splitlines() if "+23.3" in x]  # (20 + 30 + 20) / 3
    # Standard deviation 5.77 over 3 seeds, t = 4.303: half-width 14.3.
    assert line.split() == ["fedmoe", "+23.3", "+9.0", "to", "+37.7", "3"]


def test_json_is_one_object_with_rows_differences_and_notes(fedmoe, runs):
    result = fedmoe("compare", runs, "--json", "--against", "fedavg")
    [part] = json.loads(result.stdout)["experiments"]
    assert [(r["method"], r["seed"]) for r in part["runs"]] == [
        (m, s) for m in ("fedavg", "fedmoe") for s in range(3)
    ]
    [difference] = part["differences"]
    assert difference["method"] == "fedmoe" and difference["against"] == "fedavg"
    assert difference["mean"] == pytest.approx(0.7 / 3) and difference["num_pairs"] == 3
    assert part["methods"][0]["values"]["personal_mean"]["mean"] == pytest.approx(1.85 / 3)
    assert (result.stderr, result.exit_code) == ("", 0)


def test_one_common_seed_gives_no_difference_but_the_reason(fedmoe, tmp_path):
    write_run(tmp_path, "fedmoe", 0)
    write_run(tmp_path, "fedavg", 0)
    [part] = json.loads(fedmoe("compare", tmp_path, "--json").stdout)["experiments"]
    [difference] = part["differences"]
    assert "mean" not in difference and "at least 2 common seeds, got 1" in difference["why_not"]
    assert "Personal accuracy against" not in fedmoe("compare", tmp_path).stdout


def test_runs_on_different_partitions_are_not_paired(fedmoe, tmp_path):
    for seed in (0, 1):
        write_run(tmp_path, "fedmoe", seed)
        write_run(tmp_path, "fedavg", seed, partition="another")
    [part] = json.loads(fedmoe("compare", tmp_path, "--json").stdout)["experiments"]
    assert "must share its partition" in part["differences"][0]["why_not"]


def test_an_unfinished_run_is_shown_but_not_paired(fedmoe, tmp_path):
    for seed in (0, 1):
        write_run(tmp_path, "fedmoe", seed)
        write_run(tmp_path, "fedavg", seed, finished=seed == 0)
    [part] = json.loads(fedmoe("compare", tmp_path, "--json").stdout)["experiments"]
    assert part["differences"][0]["why_not"] == "fedavg seed 1 is not finished"
    assert [r["finished"] for r in part["runs"]] == [True, False, True, True]


def test_the_same_method_and_seed_from_two_folders_is_told_apart(fedmoe, tmp_path):
    write_run(tmp_path / "before", "fedmoe", 0)
    write_run(tmp_path / "after", "fedmoe", 0)
    result = fedmoe("compare", tmp_path / "before", tmp_path / "after")
    assert result.exit_code == 0
    assert "before/fedmoe" in result.stdout and "after/fedmoe" in result.stdout


def test_experiments_are_compared_each_on_its_own(fedmoe, tmp_path):
    write_run(tmp_path / "a", "fedmoe", 0, experiment="one")
    write_run(tmp_path / "b", "fedmoe", 0, experiment="other")
    result = fedmoe("compare", tmp_path / "a", tmp_path / "b")
    assert result.exit_code == 0
    assert "one: 2 clients, 2 rounds" in result.stdout
    assert "other: 2 clients, 2 rounds" in result.stdout


def test_against_a_method_that_is_not_there_names_those_that_are(fedmoe, runs):
    result = fedmoe("compare", runs, "--against", "x")
    assert result.exit_code == 2 and "fedavg and fedmoe, got 'x'" in result.stderr


def test_a_damaged_log_is_exit_code_2_and_names_the_line(fedmoe, tmp_path):
    folder = write_run(tmp_path, "fedmoe", 0)
    path = folder / "rounds.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(["{broken", *lines[1:]]) + "\n")
    result = fedmoe("compare", tmp_path)
    assert result.exit_code == 2 and "rounds.jsonl, line 1: not JSON" in result.stderr


def test_a_torn_last_line_is_left_out_and_told(fedmoe, tmp_path):
    folder = write_run(tmp_path, "fedmoe", 0)
    path = folder / "rounds.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    result = fedmoe("compare", tmp_path)
    assert result.exit_code == 0 and "torn" in result.stdout


@pytest.mark.slow
def test_report_writes_the_page_where_it_is_asked_to(fedmoe, runs, tmp_path):
    result = fedmoe("report", runs)
    assert result.exit_code == 0 and str(runs / "report.html") in result.stdout
    again = fedmoe("report", runs / "fedmoe-seed0", "--out", tmp_path / "x" / "one.html")
    assert again.exit_code == 0
    text = (tmp_path / "x" / "one.html").read_text()
    assert "<html" in text and "fedmoe" in text and "fedavg" not in text.split("<script")[0]
    assert fedmoe("report", runs, "--out", runs).exit_code == 2  # a folder
