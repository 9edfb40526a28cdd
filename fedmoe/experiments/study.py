"""Several runs side by side, one process each, with a core each; what is done is not done again.

Progress is read from the runs' own logs, so it is the same for a run that goes on after a kill.
"""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from fedmoe.device import pick_device
from fedmoe.experiments.run import Spec, run_experiment
from fedmoe.experiments.table import make_experiment
from fedmoe.report.log import read_run


@dataclass(frozen=True)
class RunProgress:
    """How far one run is."""

    spec: Spec
    folder: Path
    rounds_done: int  # of rounds + 1: the last is the closing evaluation
    bytes_moved: int
    accuracy: float | None  # mean test accuracy of models as received, where last measured
    done: bool
    error: str | None = None


def folder_of(root: Path, spec: Spec) -> Path:
    """Where this run lives: ROOT/METHOD-seedS."""
    return root / f"{spec.method}-seed{spec.seed}"


def run_study(
    jobs: Sequence[tuple[Spec, Path]],
    workers: int,
    *,
    device: str | None = None,
    watch: Callable[[list[RunProgress]], None] = lambda progress: None,
    every_s: float = 1.0,
) -> list[RunProgress]:
    """Run what is not finished, `workers` at a time; returns how each ended.

    `device` is where models train: "cpu", "cuda", or None for a GPU if there is one.

    A run that fails does not stop the others; its `error` tells why.

    Raises:
        ValueError: workers below 1, or two jobs in one folder.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1 process, got {workers}")
    folders = [folder for _, folder in jobs]
    if len(set(folders)) < len(folders):
        raise ValueError(f"every run needs a folder of its own, got {folders}")
    todo = [(s, f) for s, f in jobs if not is_finished(f)]
    for spec, folder in todo:
        if not (folder / "experiment.json").exists():
            spec.write(folder)
    errors: dict[Path, str] = {}
    if todo:
        context = get_context("spawn")  # torch's threads do not survive a fork
        pool = ProcessPoolExecutor(
            min(workers, len(todo)), mp_context=context, initializer=_one_thread
        )
        try:
            futures = {f: pool.submit(run_folder, f, device) for _, f in todo}
            while not all(future.done() for future in futures.values()):
                watch(list(_progress(jobs, errors)))
                time.sleep(every_s)
            errors = {f: e for f, future in futures.items() if (e := _error_of(future))}
        finally:
            for process in list((pool._processes or {}).values()):
                process.terminate()
            pool.shutdown(wait=True, cancel_futures=True)
    progress = list(_progress(jobs, errors))
    watch(progress)
    return progress


def run_folder(folder: Path, device: str | None = None) -> None:
    """Begin or go on with the run that `folder` describes."""
    spec = Spec.read(folder)
    experiment = make_experiment(spec)
    run_experiment(
        experiment, folder, resume=True, device=pick_device(device), complain=_say
    )


def is_finished(folder: Path) -> bool:
    """Whether the run in `folder` has its closing evaluation."""
    if not (folder / "run.json").exists():
        return False
    rounds = read_run(folder).rounds
    return bool(rounds) and rounds[-1].phase == "final"


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _one_thread() -> None:
    # Two processes of two threads each are many times slower on two cores than two of one.
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us


def _error_of(future: "Future[None]") -> str | None:
    why = future.exception()
    return None if why is None else "".join(traceback.format_exception_only(why)).strip()


def _progress(
    jobs: Sequence[tuple[Spec, Path]], errors: dict[Path, str]
) -> Iterator[RunProgress]:
    for spec, folder in jobs:
        rounds = read_run(folder).rounds if (folder / "run.json").exists() else ()
        measured = [
            [a.received_test for a in r.accuracy.values() if a.received_test is not None]
            for r in rounds
            if r.accuracy
        ]
        yield RunProgress(
            spec,
            folder,
            len(rounds),
            sum(r.bytes_down + r.bytes_up for r in rounds),
            sum(measured[-1]) / len(measured[-1]) if measured and measured[-1] else None,
            bool(rounds) and rounds[-1].phase == "final",
            errors.get(folder),
        )
