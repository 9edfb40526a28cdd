"""Runs as they go: bars where there is a terminal, plain lines where there is none."""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedmoe.cli.words import duration, plural, size
from fedmoe.experiments.study import RunProgress

WINDOW = 10  # last rounds that tell how long the next will take
PLAIN_STEPS = 10  # lines that a run writes where there is no terminal, besides its last


class Pace:
    """When rounds were seen to end, and so how long is left."""

    def __init__(self) -> None:
        self.started: dict[Path, float] = {}
        self.ends: dict[Path, list[tuple[int, float]]] = {}  # rounds done, and when

    def note(self, run: RunProgress, now: float) -> None:
        """To be told of every run that is at work."""
        self.started.setdefault(run.folder, now)
        ends = self.ends.setdefault(run.folder, [(run.rounds_done, now)])
        if run.rounds_done > ends[-1][0]:
            ends.append((run.rounds_done, now))

    def took(self, run: RunProgress, now: float) -> float:
        return now - self.started.get(run.folder, now)

    def round_s(self, folder: Path) -> float | None:
        """Seconds of one round; None before two were seen to end."""
        ends = self.ends.get(folder, [])
        known = ends[1:][-WINDOW - 1 :]  # the time before the first end is also that of starting
        if len(known) < 2:
            return None
        return (known[-1][1] - known[0][1]) / (known[-1][0] - known[0][0])

    def left_s(self, run: RunProgress, now: float, guess: float | None = None) -> float | None:
        """Seconds until a run ends; `guess` stands in for its own seconds of a round."""
        per_round = self.round_s(run.folder)
        if per_round is None:
            per_round = guess
        if per_round is None:
            return None
        ends = self.ends.get(run.folder)
        since = now - ends[-1][1] if ends else 0.0
        return max(per_round * (_rounds(run) - run.rounds_done) - min(since, per_round), 0.0)

    def all_left_s(self, progress: Sequence[RunProgress], workers: int, now: float) -> float | None:
        """Seconds until all end; runs not begun are taken to be like their method's others."""
        known = {r.folder: s for r in progress if (s := self.round_s(r.folder)) is not None}
        if not known:
            return None
        mean = sum(known.values()) / len(known)
        left = []
        for run in progress:
            if _open(run):
                own = [
                    known[r.folder]
                    for r in progress
                    if r.folder in known and r.spec.method == run.spec.method
                ]
                guess = sum(own) / len(own) if own else mean
                left.append(self.left_s(run, now, guess) or 0.0)
        return max([sum(left) / workers, *left], default=0.0)


class Display:
    """Shows what `run_study` tells it; a finished or failed run leaves one line behind."""

    def __init__(
        self, console: Console, workers: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.console, self.workers, self.clock = console, workers, clock
        self.pace = Pace()
        self.told: set[Path] | None = None  # runs whose end was said, or was known before
        self.steps: dict[Path, int] = {}  # plain lines that a run has written
        self.began = clock()
        self.live: Live | None = None

    def __enter__(self) -> "Display":
        if self.console.is_terminal:
            self.live = Live(console=self.console, auto_refresh=False, transient=True)
            self.live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        why: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.live is not None:
            self.live.stop()

    def watch(self, progress: Sequence[RunProgress]) -> None:
        """To be called every second or so."""
        now = self.clock()
        if self.told is None:
            self.told = {r.folder for r in progress if r.done}
        working = [r for r in progress if _open(r)][: self.workers]
        for run in working:
            self.pace.note(run, now)
        for run in progress:
            if not _open(run) and run.folder not in self.told:
                self.told.add(run.folder)
                self.console.print(self._ended(run, progress, now), soft_wrap=True)
        if self.live is not None:
            self.live.update(self._bars(progress, working, now), refresh=True)
        else:
            for run in working:
                self._plain(run, progress, now)

    def _ended(self, run: RunProgress, progress: Sequence[RunProgress], now: float) -> Text:
        name = f"{_name(run, progress)}  "
        if run.error is not None:
            return Text.assemble(("✗ ", "red"), (name, "bold"), ("failed: ", "red"), run.error)
        text = f"{plural(run.spec.rounds, 'round')} in {duration(self.pace.took(run, now))}"
        text += f"   {size(run.bytes_moved)}   {_percent(run.accuracy)}"
        return Text.assemble(("✓ ", "green"), (name, "bold"), text)

    def _bars(
        self, progress: Sequence[RunProgress], working: Sequence[RunProgress], now: float
    ) -> Group:
        table = Table.grid(padding=(0, 2, 0, 0), expand=True)
        table.add_column(no_wrap=True)
        table.add_column(ratio=1)
        for width in (0, 6, 8, 9):  # kept free, so that bars do not jump
            table.add_column(justify="right", no_wrap=True, min_width=width)
        for run in working:
            left = self.pace.left_s(run, now)
            shown = min(run.rounds_done, run.spec.rounds)
            table.add_row(
                Text("  " + _name(run, progress), "bold"),
                ProgressBar(_rounds(run), run.rounds_done, complete_style="cyan"),
                f"{shown}/{run.spec.rounds}",
                _percent(run.accuracy),
                size(run.bytes_moved),
                Text(f"{duration(left)} left" if left is not None else "…", "cyan"),
            )
        return Group(table, Text("  " + self._summary(progress, working, now), "dim"))

    def _summary(
        self, progress: Sequence[RunProgress], working: Sequence[RunProgress], now: float
    ) -> str:
        waiting = sum(_open(r) for r in progress) - len(working)
        parts = [f"{sum(r.done for r in progress)} of {plural(len(progress), 'run')} done"]
        if waiting:
            parts.append(f"{waiting} waiting")
        parts.append(f"{duration(now - self.began)} so far")
        left = self.pace.all_left_s(progress, self.workers, now)
        if left is not None and waiting + len(working):
            parts.append(f"about {duration(left)} left in all")
        return " · ".join(parts)

    def _plain(self, run: RunProgress, progress: Sequence[RunProgress], now: float) -> None:
        step = math.floor(run.rounds_done * PLAIN_STEPS / _rounds(run))
        if run.rounds_done == 0 or step <= self.steps.get(run.folder, 0):
            return
        self.steps[run.folder] = step
        left = self.pace.left_s(run, now)
        parts = [
            f"{_name(run, progress)}  round {min(run.rounds_done, run.spec.rounds)}"
            f"/{run.spec.rounds}",
            _percent(run.accuracy),
            size(run.bytes_moved),
        ]
        if left is not None:
            parts.append(f"{duration(left)} left")
        self.console.print("  " + "   ".join(parts), soft_wrap=True, markup=False)


def _open(run: RunProgress) -> bool:
    return not run.done and run.error is None


def _rounds(run: RunProgress) -> int:
    return run.spec.rounds + 1  # the closing evaluation is one more


def _name(run: RunProgress, progress: Sequence[RunProgress]) -> str:
    """Method and seed, padded so that runs stand under each other."""
    method = max(len(r.spec.method) for r in progress)
    seed = max(len(str(r.spec.seed)) for r in progress)
    return f"{run.spec.method:{method}}  seed {run.spec.seed:<{seed}}"


def _percent(accuracy: float | None) -> str:
    return "" if accuracy is None else f"{100 * accuracy:.1f} %"
