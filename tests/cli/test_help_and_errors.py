"""Help is short, comes fast and is true; every mistake ends in one paragraph and exit code 2."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fedmoe as package
from fedmoe.cli.app import app
from fedmoe.experiments.table import EXPERIMENTS

COMMANDS = [c.callback.__name__ for c in app.registered_commands if c.callback]


def test_help_fits_a_screen_and_shows_every_command_and_examples(fedmoe):
    result = fedmoe("--help")
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) <= 30
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert all(f"  {name} " in result.stdout for name in COMMANDS)
    assert "fedmoe run demo" in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_has_no_markup_left_and_fits_80_columns(fedmoe, command):
    result = fedmoe(command, "--help")
    assert result.exit_code == 0
    assert "\\[" not in result.stdout and "\b" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_the_help_of_run_names_every_experiment(fedmoe):
    words = {word.strip(".,") for word in fedmoe("run", "--help").stdout.split()}
    assert EXPERIMENTS.keys() <= words


def test_the_version_is_the_package_s(fedmoe):
    result = fedmoe("--version")
    assert (result.exit_code, result.stdout) == (0, f"fedmoe {package.__version__}\n")


def test_help_loads_neither_torch_nor_plotly_nor_flower():
    code = (
        "import sys; from fedmoe.cli.app import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(bool({'torch', 'plotly', 'flwr', 'numpy'} & set(sys.modules)))"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False)
    assert done.returncode == 0
    assert time.monotonic() - began < 5  # a loaded machine; alone it takes a quarter second


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["run", "demmo"], ["'demmo'", "did you mean 'demo'?", "module:function"]),
        (["run", "zzz"], ["'zzz'", "there are crowd, demo"]),
        (["run", "nowhere:tiny"], ["module 'nowhere'", "cannot be imported"]),
        (["run", "lab:tinny"], ["no function 'tinny'", "did you mean 'tiny'?"]),
        (["run", "lab:tiny", "--method", "fedmo"], ["no method 'fedmo'", "'fedmoe'"]),
        (["run", "lab:tiny", "--rounds", "0"], ["--rounds", "0 is not in the range"]),
        (["run", "lab:tiny", "--seed", "-1"], ["--seed", "-1 is not in the range"]),
        (["run", "lab:tiny", "--workers", "0"], ["--workers", "0 is not in the range"]),
        (["run", "lab:tiny", "--device", "cudda"], ["--device must be cpu", "'cudda'"]),
        (["run", "lab:poor"], ["client 0", "memory_bytes must be at least", "got 1000"]),
        (["run", "lab:narrow"], ["k must be between 1 and the 4 experts, got 9"]),
        (["run", "lab:as_list"], ["must return a mapping", "list"]),
        (["run", "lab:misnamed"], ["'mine'", "calls itself 'fedavg'", "dataclasses.replace"]),
        (["run", "lab:stubborn"], ["2 rounds", "its schedule has 7 rounds"]),
        (["run", "lab:faulty"], ["lab:faulty cannot be made", "KeyError", "FEDMOE_TRACEBACK=1"]),
        (["run", "lab:without_rounds"], ["no default number of rounds"]),
        (["plan", "lab:poor"], ["memory_bytes must be at least", "got 1000"]),
        (["plan", "demmo"], ["did you mean 'demo'?"]),
        (["plan", "lab:tiny", "--method", "x"], ["no method 'x'", "there are"]),
        (["resume", "nowhere"], ["nowhere does not exist"]),
        (["resume", "."], ["holds no run", "fedmoe run NAME --out"]),
        (["compare", "nowhere"], ["nowhere is no folder"]),
        (["compare", "."], ["holds no run"]),
        (["report", "."], ["holds no run"]),
        (["inspect", "nowhere"], ["nowhere is no folder"]),
        (["inspect", "."], ["holds no checkpoint"]),
        (["unknown"], ["No such command"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and len(value) < 4 else None,
)
def test_a_mistake_ends_with_exit_code_2_and_says_what_to_mend(fedmoe, inside, arguments, told):
    result = fedmoe(*arguments)
    assert result.exit_code == 2, result.output
    assert [t for t in told if t not in " ".join(result.stderr.split())] == []
    assert "Traceback" not in result.output
    assert list(inside.iterdir()) == []  # nothing half-written


def test_missing_data_is_told_with_the_ways_to_get_it(fedmoe, inside, monkeypatch):
    monkeypatch.setenv("FEDMOE_FASHION_MNIST", str(inside / "empty"))
    result = fedmoe("run", "demo")
    assert result.exit_code == 2
    assert "FEDMOE_FASHION_MNIST" in result.stderr and "apt-get install" in result.stderr
    assert list(inside.iterdir()) == []


@pytest.mark.parametrize("command", ["run", "plan"])
def test_json_leaves_stdout_empty_when_the_input_is_bad(fedmoe, inside, command):
    result = fedmoe(command, "lab:poor", "--json")
    assert (result.exit_code, result.stdout) == (2, "")


def test_the_traceback_comes_when_it_is_asked_for(fedmoe, inside, monkeypatch):
    monkeypatch.setenv("FEDMOE_TRACEBACK", "1")
    result = fedmoe("run", "lab:faulty")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr and "in faulty" in result.stderr


def test_a_fault_in_the_code_is_exit_code_1(fedmoe, inside, monkeypatch):
    def fall_over(*arguments: object) -> None:
        raise AttributeError("no such thing")

    monkeypatch.setattr("fedmoe.cli.compare.find_runs", fall_over)
    result = fedmoe("compare", ".")
    assert result.exit_code == 1
    assert "AttributeError: no such thing" in result.stderr
    assert "FEDMOE_TRACEBACK=1" in result.stderr


def test_an_out_folder_that_is_a_file_is_refused(fedmoe, inside):
    (inside / "file").write_text("")
    for out in ("file", "file/below"):
        result = fedmoe("run", "lab:tiny", "--out", out)
        assert result.exit_code == 2 and "is a file" in result.stderr
    assert (inside / "file").read_text() == ""


def spec(folder: Path, **changes: object) -> None:
    own = {"target": "lab:tiny", "method": "fedavg", "seed": 0, "rounds": 2, "arguments": {}}
    folder.mkdir(parents=True)
    (folder / "experiment.json").write_text(json.dumps(own | changes))


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"rounds": 5}, ["holds runs of 5 rounds", "not of 2", "--rounds 5"]),
        ({"target": "demo"}, ["holds runs of 'demo'", "not of 'lab:tiny'", "--out"]),
    ],
)
def test_a_folder_of_other_runs_is_refused_and_left_as_it_was(fedmoe, inside, changes, told):
    spec(inside / "runs" / "fedavg-seed0", **changes)
    before = sorted(inside.rglob("*"))
    result = fedmoe("run", "lab:tiny", "--out", "runs")
    assert result.exit_code == 2
    assert [t for t in told if t not in result.stderr] == []
    assert sorted(inside.rglob("*")) == before


def test_the_folder_of_a_single_run_is_no_place_for_runs(fedmoe, inside):
    spec(inside / "one")
    result = fedmoe("run", "lab:tiny", "--out", "one")
    assert result.exit_code == 2 and "fedmoe resume one" in result.stderr


def test_an_experiment_file_that_is_none_is_told_by_name(fedmoe, inside):
    (inside / "runs" / "x").mkdir(parents=True)
    (inside / "runs" / "x" / "experiment.json").write_text("{")
    result = fedmoe("resume", "runs")
    assert result.exit_code == 2 and "experiment.json does not describe" in result.stderr
