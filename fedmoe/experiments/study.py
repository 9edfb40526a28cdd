"""Several runs side by side, one process each, with a core each; what is done is not done again.

Progress is read from the runs' own logs, so it is the same for a run that goes on after a kill.
"""

import fcntl
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from multiprocessing import get_context, parent_process
from pathlib import Path

from fedmoe.device import keep_freed_memory, pick_device
from fedmoe.exchange.actors import Actors, keep_strangers_out
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


def say(line: str) -> None:
    """On stderr, from whichever process."""
    print(line, file=sys.stderr, flush=True)


def folder_of(root: Path, spec: Spec) -> Path:
    """Where this run lives: ROOT/METHOD-seedS."""
    return root / f"{spec.method}-seed{spec.seed}"


def run_study(
    jobs: Sequence[tuple[Spec, Path]],
    workers: int,
    *,
    device: str | None = None,
    actors: Actors | None = None,
    watch: Callable[[list[RunProgress]], None] = lambda progress: None,
    complain: Callable[[str], None] = say,
    every_s: float = 1.0,
) -> list[RunProgress]:
    """Run what is not finished, `workers` at a time; returns how each ended.

    `device` is where models train: "cpu", "cuda", or None for a GPU if there is one. With `actors`
    each of the runs that go side by side has as many, for its clients.

    A run that fails does not stop the others; its `error` tells why. `complain` is called in the
    runs' own processes, so it must be a function of a module.

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
    seen: Seen = {}
    if todo:
        with _reached(actors, min(workers, len(todo))) as reached:
            context = get_context("spawn")  # torch's threads do not survive a fork
            pool = ProcessPoolExecutor(
                min(workers, len(todo)), mp_context=context, initializer=_one_thread
            )
            try:
                with _interrupts_later():
                    futures = {
                        f: pool.submit(run_folder, f, device, complain, reached)
                        for _, f in todo
                    }
                while not all(future.done() for future in futures.values()):
                    watch(list(_progress(jobs, errors, seen)))
                    time.sleep(every_s)
                    errors = _errors_of(futures)
                errors = _errors_of(futures)
            finally:
                for process in list((pool._processes or {}).values()):
                    process.terminate()
                pool.shutdown(wait=True, cancel_futures=True)
    progress = list(_progress(jobs, errors, seen))
    watch(progress)
    return progress


def run_folder(
    folder: Path,
    device: str | None = None,
    complain: Callable[[str], None] = say,
    actors: Actors | None = None,
) -> None:
    """Begin or go on with the run that `folder` describes.

    Raises:
        ValueError: another process is at work on it.
    """
    spec = Spec.read(folder)
    with alone(folder):
        if is_finished(folder):  # by another process, since this one looked
            return
        run_experiment(
            make_experiment(spec),
            folder,
            resume=True,
            device=pick_device(device),
            complain=complain,
            actors=actors,
            trainer=spec.trainer,
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


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the run's lock; the system lets go of it when this process ends, however it ends."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as why:
            raise ValueError(
                f"{folder} is being run by another process; wait for it, or end it first"
            ) from why
        yield


def _reached(actors: Actors | None, groups: int) -> AbstractContextManager[Actors | None]:
    """The actors at an address, so that runs in processes of their own share one Ray."""
    if actors is None:
        return nullcontext()
    if actors.address is None:
        keep_strangers_out()
    from fedmoe.exchange.ray.cluster import started

    return started(actors, groups)


@contextmanager
def _interrupts_later() -> Iterator[None]:
    """Hold back Ctrl-C, so that processes started meanwhile leave it to this one."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _one_thread() -> None:
    # Two processes of two threads each are many times slower on two cores than two of one.
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    keep_freed_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A worker that outlives a killed parent would write beside the run that is resumed.
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _errors_of(futures: Mapping[Path, "Future[None]"]) -> dict[Path, str]:
    """Of those that have ended, why each failed that did."""
    errors = {}
    for folder, future in futures.items():
        why = future.exception() if future.done() else None
        if isinstance(why, BrokenProcessPool):
            errors[folder] = "a process of the study was killed, or ran out of memory"
        elif why is not None:
            errors[folder] = "".join(traceback.format_exception_only(why)).strip()
    return errors


Seen = dict[Path, tuple[tuple[int, int], RunProgress]]  # by size and time of a run's log


def _progress(
    jobs: Sequence[tuple[Spec, Path]], errors: Mapping[Path, str], seen: Seen
) -> Iterator[RunProgress]:
    """How far each run is; a log that is as it was when last `seen` is not read again."""
    for spec, folder in jobs:
        log = folder / "rounds.jsonl"
        stat = log.stat() if (folder / "run.json").exists() and log.exists() else None
        version = (stat.st_size, stat.st_mtime_ns) if stat is not None else (0, 0)
        if folder not in seen or seen[folder][0] != version:
            seen[folder] = version, _read_progress(spec, folder, stat is not None)
        yield replace(seen[folder][1], error=errors.get(folder))


def _read_progress(spec: Spec, folder: Path, begun: bool) -> RunProgress:
    rounds = read_run(folder).rounds if begun else ()
    measured = [
        [a.received_test for a in r.accuracy.values() if a.received_test is not None]
        for r in rounds
        if r.accuracy
    ]
    return RunProgress(
        spec,
        folder,
        len(rounds),
        sum(r.bytes_down + r.bytes_up for r in rounds),
        sum(measured[-1]) / len(measured[-1]) if measured and measured[-1] else None,
        bool(rounds) and rounds[-1].phase == "final",
    )
