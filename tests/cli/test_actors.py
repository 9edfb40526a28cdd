"""Runs over Ray's actors, through the console script."""

from __future__ import annotations

import os
import signal
import time
import uuid
from pathlib import Path

import pytest

from tests.cli.conftest import make_lab

PATIENCE_S = 300.0  # Ray takes its time to start on a busy machine
RUN = "runs/private-router-seed0"


def processes_with(*marks: str) -> dict[str, str]:
    """The command lines of all that have inherited these, by pid (a worker changes its own)."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            environ = (place / "environ").read_bytes()
            if all(mark.encode() in environ for mark in marks):
                found[place.name] = (place / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            pass  # it has ended meanwhile, or is somebody else's
    return found


@pytest.mark.slow
@pytest.mark.xdist_group("cli-actors")
def test_ctrl_c_leaves_no_process_of_a_run_over_actors(tmp_path):
    lab, mark = make_lab(tmp_path), uuid.uuid4().hex
    asked = ("run", "lab:tiny", "--rounds", "500", "--method", "private-router", "--out", "runs")
    process = lab.start(*asked, "--no-report", "--actors", "2", MARK=mark)
    log, end = lab.folder / RUN / "rounds.jsonl", time.monotonic() + PATIENCE_S
    while not log.exists() or log.read_bytes().count(b"\n") < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "no round was done"
        time.sleep(0.05)
    workers = {pid for pid, line in processes_with(mark).items() if "ray::Worker" in line}
    known = processes_with(mark, "RAY_AUTH_MODE=token", "RAY_AUTH_TOKEN=")
    assert len(workers) == 2 and workers <= set(known)  # no stranger can give them work
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to all
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130, err
    assert "Go on with: fedmoe resume runs" in err and "Traceback" not in err
    while processes_with(mark):
        assert time.monotonic() < end + PATIENCE_S, processes_with(mark)
        time.sleep(0.1)


@pytest.mark.parametrize("option", [("--ray-address", "auto"), ("--gpus-per-actor", "0.5")])
def test_who_says_something_of_actors_must_say_how_many(fedmoe, inside, option):
    result = fedmoe("run", "lab:tiny", *option)
    assert result.exit_code == 2
    assert f"{option[0]} needs --actors N" in result.output


def test_a_share_of_gpus_that_cannot_be_is_refused(fedmoe, inside):
    result = fedmoe("run", "lab:tiny", "--actors", "2", "--gpus-per-actor", "1.5")
    assert result.exit_code == 2
    assert "--gpus-per-actor: gpus must be whole where it is above 1, got 1.5" in result.output
