"""A run that is killed, whenever that is, goes on and ends with the bits of one that was not."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from fedmoe.experiments.study import run_folder
from tests.cli.conftest import START_S, Lab, make_lab

pytestmark = pytest.mark.slow

ROUNDS = 6
METHODS = ("fedmoe", "private-router")  # one keeps all on the server, one part on the clients
RUN = ("run", "lab:tiny", "--rounds", str(ROUNDS), "--out", "runs", "--no-report")
CHOSEN = tuple(x for m in METHODS for x in ("--method", m))
FOLDERS = tuple(f"runs/{m}-seed0" for m in METHODS)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Lab:
    lab = make_lab(tmp_path_factory.mktemp("undisturbed"))
    result = lab.call(*RUN, *CHOSEN)
    assert result.returncode == 0, result.stderr
    return lab


def logs(lab: Lab) -> list[object]:
    return [lab.lines(folder) for folder in FOLDERS]


def wait_until_free(run: Path) -> None:
    """Until nobody works on a run: its lock is let go of when its process is gone."""
    end = time.monotonic() + START_S
    while True:
        with (run / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError:
                assert time.monotonic() < end, "a worker has outlived its parent"
                time.sleep(0.02)


@pytest.mark.xdist_group("cli-kill")
def test_a_study_killed_in_every_phase_ends_with_the_same_log_and_bits(undisturbed, tmp_path):
    lab = make_lab(tmp_path)
    places = [
        "start:0",  # before the log exists
        "created:0",  # before the first round
        "work:1",  # in training, some clients done
        "log:2",  # after a line, before its checkpoint
        "torn:3",  # in the middle of a line
        "checkpoint:5",  # in the middle of a checkpoint
        f"work:{ROUNDS}",  # in the closing evaluation
    ]
    for i, place in enumerate(places):
        arguments = (*RUN, *CHOSEN) if i == 0 else ("resume", "runs", "--no-report")
        result = lab.call(*arguments, LAB_KILL=place)
        assert result.returncode == -signal.SIGKILL, (place, result.stderr)
        for folder in FOLDERS:
            if (lab.folder / folder / ".lock").exists():
                wait_until_free(lab.folder / folder)
    result = lab.call("resume", "runs", "--json", "--no-report")
    assert result.returncode == 0, result.stderr
    assert logs(lab) == logs(undisturbed)
    rows = json.loads(result.stdout)["runs"]
    assert [r["model_hash"] for r in rows] == [
        lines[-1]["model_hash"] for lines in logs(undisturbed)
    ]
    assert all(r["finished"] for r in rows)
    assert not list(lab.folder.glob("runs/**/*.part"))  # nothing is left lying about


@pytest.mark.xdist_group("cli-kill")
def test_a_run_killed_at_random_moments_ends_with_the_same_log_and_bits(undisturbed, tmp_path):
    lab = make_lab(tmp_path)
    draw = random.Random(0)
    for i in range(3):
        process = lab.start(*(RUN + CHOSEN if i == 0 else ("resume", "runs", "--no-report")))
        lab.wait_for_lines(FOLDERS[i % 2], i + 1)
        time.sleep(draw.uniform(0.0, 0.5))
        os.kill(process.pid, signal.SIGKILL)  # the parent alone: its workers must end by themselves
        process.communicate()
        for folder in FOLDERS:
            wait_until_free(lab.folder / folder)
        count = [len(lines) for lines in logs_so_far(lab)]
        time.sleep(0.5)
        assert [len(lines) for lines in logs_so_far(lab)] == count  # nobody writes any more
    result = lab.call("resume", "runs", "--no-report")
    assert result.returncode == 0, result.stderr
    assert logs(lab) == logs(undisturbed)


def logs_so_far(lab: Lab) -> list[list[bytes]]:
    return [(lab.folder / f / "rounds.jsonl").read_bytes().splitlines() for f in FOLDERS]


@pytest.mark.xdist_group("cli-kill")
@pytest.mark.parametrize(
    "number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"]
)
def test_a_run_that_is_stopped_says_how_to_go_on(tmp_path, number, code):
    lab = make_lab(tmp_path)
    process = lab.start("run", "lab:tiny", "--rounds", "500", *CHOSEN, "--out", "runs", "--json")
    lab.wait_for_lines(FOLDERS[0], 1)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # a terminal sends it to all
    else:
        os.kill(process.pid, number)
    out, err = process.communicate(timeout=START_S)
    assert process.returncode == code, err
    assert out == "" and "Traceback" not in err
    assert "stopped with 0 of 2 runs finished" in err and "fedmoe resume runs" in err
    for folder in FOLDERS:
        if (lab.folder / folder / ".lock").exists():
            wait_until_free(lab.folder / folder)


def without_its_end(lab: Lab, folder: Path) -> Lab:
    """A copy in which the runs lack their closing evaluation."""
    shutil.copytree(lab.folder, folder, dirs_exist_ok=True)
    for name in FOLDERS:
        path = folder / name / "rounds.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    return Lab(folder)


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.xdist_group("cli-kill")
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before_and_says_so(
    undisturbed, tmp_path
):
    lab = without_its_end(undisturbed, tmp_path)
    for folder in FOLDERS:
        damage(tmp_path / folder / "checkpoints" / f"round-{ROUNDS:06d}" / "state.safetensors")
    result = lab.call("resume", "runs", "--json", "--no-report")
    assert result.returncode == 0, result.stderr
    assert f"round-{ROUNDS:06d}: its content does not match its hash" in result.stderr
    assert "falling back to the checkpoint before it" in result.stderr
    assert f"goes on after {ROUNDS - 1} of {ROUNDS} rounds" in result.stderr
    rows = json.loads(result.stdout)["runs"]
    assert [r["went_on_from_round"] for r in rows] == [ROUNDS - 1] * 2
    assert [len(r["damaged_checkpoints"]) for r in rows] == [1, 1]
    assert logs(lab) == logs(undisturbed)


@pytest.mark.xdist_group("cli-kill")
def test_a_single_run_whose_checkpoints_are_all_damaged_starts_again_and_says_so(
    undisturbed, tmp_path
):
    lab = without_its_end(undisturbed, tmp_path)
    for path in (tmp_path / FOLDERS[1] / "checkpoints").glob("*/state.json"):
        path.write_bytes(path.read_bytes()[:-20])
    result = lab.call("resume", FOLDERS[1], "--no-report", "--quiet")
    assert result.returncode == 0
    assert result.stderr.count("cannot be read") == 3  # all that are kept
    assert lab.lines(FOLDERS[1]) == undisturbed.lines(FOLDERS[1])


LONGER = """
from dataclasses import dataclass
from fedmoe.federated.fedmoe import FedMoEState

@dataclass(frozen=True, eq=False)
class LongerState(FedMoEState):
    more: int = 0

class Longer(FedMoE):
    def init(self, model, clients):
        return LongerState(**vars(super().init(model, clients)))
"""


@pytest.mark.xdist_group("cli-kill")
def test_a_checkpoint_of_code_that_has_changed_since_is_refused_and_left_as_it_is(
    undisturbed, tmp_path
):
    lab = without_its_end(undisturbed, tmp_path)
    text = (tmp_path / "lab.py").read_text()
    assert "FedMoE(seed=seed)" in text
    text = text.replace("FedMoE(seed=seed)", "Longer(seed=seed)")
    (tmp_path / "lab.py").write_text(text.replace("def poor", f"{LONGER}\n\ndef poor"))
    before = logs(lab)
    result = lab.call("resume", FOLDERS[0])
    assert result.returncode == 2, result.stderr
    assert "although its content is whole" in result.stderr
    assert logs(lab) == before


def test_a_run_that_another_process_works_on_is_left_to_it(lab, tmp_path):
    run = tmp_path / "fedavg-seed0"
    run.mkdir()
    spec = {"target": "demo", "method": "fedavg", "seed": 0, "rounds": 2, "arguments": {}}
    (run / "experiment.json").write_text(json.dumps(spec))
    with (run / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="is being run by another process"):
            run_folder(run)
