"""FedMoE with 1,000 clients, of whom 100 take part in each round, on two cores.

    python -m simulations.thousand_clients [--actors 2] [--method fedmoe --method local]

The clients are those of *crowd* (fedmoe/data/crowd.py): about 40 images each, in four domains that
contradict each other, on devices that hold a quarter of the experts. `--clients 1000000` takes no
longer for a round. A run that was stopped goes on after its last finished round, in any way; it
ends with the table, and says how long a round took.

With two actors (Ray) each core trains clients; without, this process trains one after another, and
there is no Ray to start, which takes some seconds. The bits are the same.
"""

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fedmoe.cli import compare
from fedmoe.cli.live import Display
from fedmoe.cli.words import console
from fedmoe.device import keep_freed_memory
from fedmoe.exchange.actors import Actors
from fedmoe.experiments.run import Spec, run_experiment
from fedmoe.experiments.study import RunProgress, alone, folder_of, is_finished, say
from fedmoe.experiments.table import make_experiment
from fedmoe.federated.cohort import TRAINERS
from fedmoe.report.log import RoundRecord, read_run, read_runs

ACTORS = 2  # one for each core
SHOWN_EVERY_S = 0.25


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--per-round", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--actors", type=int, default=ACTORS, help=f"0: this process alone (default: {ACTORS})"
    )
    parser.add_argument(
        "--trainer", choices=TRAINERS, default="compiled", help="see fedmoe/federated/cohort.py"
    )
    parser.add_argument(
        "--method", action="append", help="fedmoe (the default), fedavg or local; may be repeated"
    )
    parser.add_argument("--out", type=Path, default=None, help="where the runs live")
    options = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    keep_freed_memory()
    given = {"clients": options.clients, "per_round": options.per_round}
    rounds, trainer = options.rounds, options.trainer
    methods = options.method or ["fedmoe"]
    root = options.out or Path("runs") / f"crowd-{options.clients}"
    actors = Actors(options.actors) if options.actors else None
    for method in methods:
        spec = Spec("crowd", method, options.seed, rounds, given, trainer)
        run(spec, folder_of(root, spec), actors)
    runs = [r for r in read_runs(root) if r.info.method in methods]
    compare.show([r for r in runs if r.info.seed == options.seed])
    print()
    for method in methods:
        seconds = _seconds(folder_of(root, Spec("crowd", method, options.seed, options.rounds)))
        if len(seconds) > 1:
            print(
                f"{method}: {statistics.median(seconds[1:]):.2f} s a round (median after the "
                f"first, which took {seconds[0]:.1f} s; at most {max(seconds[1:]):.2f} s)"
            )


def run(spec: Spec, folder: Path, actors: Actors | None) -> None:
    """Begin or go on with one run, and show how far it is; nothing where it is finished."""
    if is_finished(folder):
        say(f"{folder} is finished")
        return
    spec.write(folder)
    with alone(folder), Display(console(), workers=1) as display:
        shown = Shown(spec, folder, display)
        run_experiment(
            make_experiment(spec),
            folder,
            resume=True,
            on_client=shown.client,
            on_round=shown.round,
            complain=say,
            actors=actors,
            trainer=spec.trainer,
        )


class Shown:
    """What a run says of itself, on the display."""

    def __init__(self, spec: Spec, folder: Path, display: Display) -> None:
        begun = read_run(folder).rounds if (folder / "run.json").exists() else ()
        moved = sum(r.bytes_down + r.bytes_up for r in begun)
        self.progress = RunProgress(spec, folder, len(begun), moved, None, False)
        self.display, self.last = display, 0.0
        self.display.watch([self.progress])

    def client(self, client: int) -> None:
        if time.monotonic() - self.last > SHOWN_EVERY_S:
            self.last = time.monotonic()
            self.display.watch([self.progress])

    def round(self, record: RoundRecord) -> None:
        told = (record.accuracy or {}).values()
        tests = [a.received_test for a in told if a.received_test is not None]
        self.progress = replace(
            self.progress,
            rounds_done=record.round + 1,
            bytes_moved=self.progress.bytes_moved + record.bytes_down + record.bytes_up,
            accuracy=sum(tests) / len(tests) if tests else self.progress.accuracy,
            done=record.phase == "final",
        )
        self.display.watch([self.progress])


def _seconds(folder: Path) -> list[float]:
    """Of each round, from what clients are sent to the averages; without the last evaluation."""
    return [r.seconds for r in read_run(folder).rounds if r.phase != "final"]


if __name__ == "__main__":
    main()
