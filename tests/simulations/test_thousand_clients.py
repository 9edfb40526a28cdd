"""The script of 1,000 clients, with fewer."""

import pytest

from fedmoe.report.log import read_run
from simulations.thousand_clients import main

pytestmark = pytest.mark.slow


def few(folder, *more):
    main(
        ["--clients", "40", "--per-round", "6", "--rounds", "2", "--out", str(folder), *more]
    )  # fmt: skip


def test_it_runs_ends_with_the_table_and_says_how_long_a_round_took(tmp_path, capsys):
    few(tmp_path, "--actors", "0")
    said = capsys.readouterr().out
    assert "crowd: 40 clients" in said and "fedmoe" in said
    assert "s a round (median after the first" in said
    run = read_run(tmp_path / "fedmoe-seed0")
    assert [r.phase for r in run.rounds] == ["explore", "train", "final"]
    assert len(run.rounds[-1].accuracy) == 40

    # What is finished is only shown again; what was killed goes on.
    log = tmp_path / "fedmoe-seed0" / "rounds.jsonl"
    whole = log.read_text().splitlines()
    log.write_text("\n".join(whole[:2]) + "\n")  # as if killed in the closing evaluation
    few(tmp_path, "--actors", "0")
    assert "s a round" in capsys.readouterr().out
    again = read_run(tmp_path / "fedmoe-seed0")
    assert [r.model_hash for r in again.rounds] == [r.model_hash for r in run.rounds]
