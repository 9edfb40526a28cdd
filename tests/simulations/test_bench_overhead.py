"""The benchmark's own parts, without any process."""

import json

import pytest

from simulations import bench_overhead
from simulations.bench_overhead import CASES, OURS, QUICK, Case, Timing


def test_a_side_tells_the_first_round_apart_from_the_others():
    # Begun at 10; rounds from 12 to 15, 20 to 21, 21 to 23.
    assert bench_overhead.timing(10.0, [12.0, 15.0, 20.0, 21.0, 21.0, 23.0]) == Timing(
        5.0, (1.0, 2.0)
    )


@pytest.mark.parametrize("side", ["grid, one process", "exchange, one process"])
def test_a_side_has_a_timing_of_each_case(monkeypatch, side):
    for name in ("GRID_ROUNDS", "EXCHANGE_ROUNDS"):
        monkeypatch.setattr(bench_overhead, name, 3)
    found = list(OURS[side]([Case(4, 2, 1), Case(6, 3, 1)]))
    assert [len(t.rounds_s) for t in found] == [3, 3]
    assert all(t.first_s > 0 for t in found)


@pytest.mark.parametrize("cases", [1, 3, 6])
def test_the_sides_take_turns_and_flower_has_every_case_once(cases):
    turns = list(bench_overhead.turns_of(range(cases)))
    assert [some for side, some in turns if side == "Flower"] == [[i] for i in range(cases)]
    assert all(list(some) == list(range(cases)) for side, some in turns if side != "Flower")
    sides = [side for side, _ in turns]
    assert [s for s in sides if s not in ("Flower", QUICK)] == [s for s in OURS if s != QUICK]
    assert all(sides[i + 1] == QUICK for i, side in enumerate(sides) if side == "Flower")


def test_a_row_says_what_scripts_read(monkeypatch, capsys):
    def apart(side, numbers):
        # Flower's needs 1 s a round of 100 clients, and then 3 s; ours a hundredth of a second.
        flowers = Timing(20.0, (1.0, 3.0, 2.0))
        return [flowers if side == "Flower" else Timing(0.5, (0.01, 0.03, 0.01)) for _ in numbers]

    monkeypatch.setattr(bench_overhead, "apart", apart)
    monkeypatch.setattr("sys.argv", ["bench_overhead", "--json"])
    bench_overhead.main()
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report.keys() == {"bench", "machine", "settings", "versions", "rows"}
    assert len(report["rows"]) == 2 * 3 * len(OURS)
    first, second = report["rows"][:2]
    assert first == {
        "case": CASES[0].name,
        "side": "grid, one process",
        "peer": "Flower",
        "ours": 10_000.0,
        "theirs": 50.0,
        "unit": "clients/s",
        "ratio": 200.0,
    }
    assert second["case"] == f"{CASES[0].name}, first" and second["ratio"] == 40.0


def test_a_side_that_fails_is_told_with_what_it_said(monkeypatch):
    monkeypatch.setattr(bench_overhead.sys, "executable", "false")
    with pytest.raises(RuntimeError, match="Flower failed \\(1\\)"):
        bench_overhead.apart("Flower", [0])
