"""Progress, with a clock of the test's own."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from fedmoe.cli.live import Display, Pace
from fedmoe.experiments.run import Spec
from fedmoe.experiments.study import RunProgress


def progress(method="fedmoe", seed=0, rounds_done=0, *, rounds=9, done=False, error=None):
    spec = Spec("demo", method, seed, rounds)
    accuracy = 0.5 if rounds_done else None
    folder = Path(f"{method}-seed{seed}")
    return RunProgress(spec, folder, rounds_done, 2**20 * rounds_done, accuracy, done, error)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_time_that_is_left_is_told_from_rounds_that_were_seen_to_end():
    pace = Pace()
    pace.note(progress(rounds_done=0), 0.0)
    pace.note(progress(rounds_done=1), 30.0)  # starting took most of these
    assert pace.left_s(progress(rounds_done=1), 30.0) is None
    pace.note(progress(rounds_done=3), 34.0)
    assert pace.round_s(Path("fedmoe-seed0")) == 2.0
    assert pace.left_s(progress(rounds_done=3), 34.0) == 14.0  # 7 of 10, 2 s each
    assert pace.left_s(progress(rounds_done=3), 35.0) == 13.0
    assert pace.left_s(progress(rounds_done=3), 99.0) == 12.0  # late: this one is nearly over


def test_runs_that_wait_are_taken_to_be_like_their_method_s_others():
    pace = Pace()
    slow = progress("slow")
    for rounds_done, now in ((0, 0.0), (1, 1.0), (2, 5.0)):
        pace.note(progress("quick", rounds_done=rounds_done), now / 4)
        pace.note(progress("slow", rounds_done=rounds_done), now)
    runs = [
        progress("quick", rounds_done=10, done=True),
        progress("slow", rounds_done=10, done=True),
        progress("slow", seed=1),
        progress("new"),
    ]
    assert slow.spec.rounds == 9
    # slow: 10 rounds of 4 s; new: 10 of the mean of 1 and 4; two at a time.
    assert pace.all_left_s(runs, 2, 5.0) == 40.0
    assert pace.all_left_s(runs, 1, 5.0) == 65.0


def show(console, clock, *steps):
    with Display(console, 1, clock) as display:
        for runs in steps:
            display.watch(runs)
            clock.now += 10.0


def test_without_a_terminal_come_plain_lines_and_few_of_them():
    out = io.StringIO()
    steps = [[progress(rounds_done=n, rounds=99)] for n in range(100)]
    show(Console(file=out, width=80), Clock(), *steps, [progress(rounds_done=100, done=True)])
    lines = out.getvalue().splitlines()
    assert 9 <= len(lines) <= 12
    assert "\x1b" not in out.getvalue()
    assert lines[0].split() == [
        "fedmoe", "seed", "0", "round", "10/99", "50.0", "%", "10.0", "MiB", "15:00", "left",
    ]  # fmt: skip
    assert lines[-1].startswith("✓ fedmoe  seed 0")


def test_a_finished_and_a_failed_run_leave_one_line_each_and_old_ones_none():
    out = io.StringIO()
    old = progress("old", rounds_done=10, done=True)
    show(
        Console(file=out, width=80),
        Clock(),
        [old, progress("a"), progress("b")],
        [old, progress("a", rounds_done=10, done=True), progress("b", error="[it] broke")],
        [old, progress("a", rounds_done=10, done=True), progress("b", error="[it] broke")],
    )
    lines = out.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("✓ a") and lines[1].startswith("✗ b")
    assert lines[1].endswith("failed: [it] broke")


@pytest.mark.parametrize("width", [60, 80, 120])
def test_on_a_terminal_every_run_at_work_has_a_bar_that_fits(width):
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, color_system=None)
    runs = [progress("fedavg-per-group", rounds_done=3), progress("local"), progress("waits")]
    display = Display(console, 2, Clock())
    console.print(display._bars(runs, runs[:2], 1.0))  # what the live region shows
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert "fedavg-per-group  seed 0" in lines[0] and "3/9" in lines[0]
    assert ("━" in lines[0]) == (width >= 80)  # the bar takes what room is left
    assert "local" in lines[1] and "waits" not in out.getvalue()
    assert "1 waiting" in lines[-1]
