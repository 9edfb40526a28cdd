"""A log is followed line by line, whatever its writer does to it."""

from __future__ import annotations

import pytest

from fedmoe.deploy.follow import Follower, Tail
from fedmoe.report.log import RunLog
from tests.cli.conftest import write_run


def test_each_round_is_told_once(tmp_path):
    run = write_run(tmp_path, rounds=3)
    follower = Follower(run)
    assert [r.round for r in follower.look()] == [0, 1, 2, 3]
    assert follower.look() == []
    assert follower.is_finished and follower.info is not None
    assert follower.bytes_moved == 3 * 2000 + 1000
    assert follower.accuracy == 0.5


def test_nothing_is_there_before_the_log_is(tmp_path):
    follower = Follower(tmp_path / "none")
    assert follower.look() == [] and follower.accuracy is None and not follower.is_finished


def test_a_line_counts_once_it_is_whole(tmp_path):
    run = write_run(tmp_path, rounds=2)
    path = run / "rounds.jsonl"
    text = path.read_bytes()
    first = text.index(b"\n") + 1
    path.write_bytes(text[: first + 10])
    follower = Follower(run)
    assert [r.round for r in follower.look()] == [0]
    assert follower.look() == []
    with path.open("ab") as file:
        file.write(text[first + 10 :])
    assert [r.round for r in follower.look()] == [1, 2]


def test_a_log_that_is_cut_back_is_read_again_and_only_what_is_new_is_told(tmp_path):
    run = write_run(tmp_path, rounds=3, finished=False)
    follower = Follower(run)
    records = follower.look()
    log = RunLog.open(run)
    log.truncate_to(2)
    assert follower.look() == [] and [r.round for r in follower.records] == [0, 1]
    log.append(records[2])
    assert [r.round for r in follower.look()] == [2]


def test_a_log_that_is_not_one_is_named(tmp_path):
    run = write_run(tmp_path)
    (run / "rounds.jsonl").write_text("nonsense\n")
    with pytest.raises(ValueError, match=r"rounds\.jsonl, round 0"):
        Follower(run).look()


def test_a_tail_begins_at_the_end_and_waits_for_whole_lines(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text('{"kind": "old"}\n')
    tail, early = Tail(path), Tail(tmp_path / "later.jsonl")
    assert list(tail.look()) == [] == list(early.look())
    with path.open("a") as file:
        file.write('{"kind": "new"}\nnonsense\n[1]\n{"kind": ')
    assert list(tail.look()) == [{"kind": "new"}]
    with path.open("a") as file:
        file.write('"whole"}\n')
    assert list(tail.look()) == [{"kind": "whole"}]
    (tmp_path / "later.jsonl").write_text('{"kind": "first"}\n')
    assert list(early.look()) == [{"kind": "first"}]
