"""Begin runs, or go on with them; show how they go, and what came out."""

import math
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.text import Text
from torch.cuda import device_count

from fedmoe.cli.compare import show, write_page
from fedmoe.cli.live import Display
from fedmoe.cli.making import check_place, device_of, methods_of, rounds_of
from fedmoe.cli.standing import Job, Standing, check_root, run_folders, standing_of
from fedmoe.cli.trouble import FAILED, INTERRUPTED, CommandError, reason
from fedmoe.cli.words import (
    console,
    duration,
    listed,
    nothing_on_stdout,
    plural,
    write_json,
)
from fedmoe.exchange.actors import Actors, ActorsError
from fedmoe.experiments.experiment import Experiment
from fedmoe.experiments.run import Spec
from fedmoe.experiments.study import (
    RunProgress,
    folder_of,
    is_finished,
    run_study,
    usable_cores,
)
from fedmoe.experiments.table import pick_method
from fedmoe.federated.cohort import TRAINERS, Trainer, choose
from fedmoe.report.log import Run, read_run
from fedmoe.report.measures import Row, final_evaluation, result_row

DEFAULT_WORKERS = 2
FASTEST = "fastest"  # in place of a trainer: a measurement chooses


@dataclass(frozen=True)
class Manner:
    """How to run, whatever is run."""

    workers: int | None
    device: str | None
    json: bool
    report: bool
    quiet: bool
    actors: Actors | None = None
    trainer: str | None = None  # one of TRAINERS; "fastest": found out; None: as it was begun

    @property
    def processes(self) -> int:
        if self.workers is None and self.actors is not None:
            return 1
        return self.workers or min(DEFAULT_WORKERS, usable_cores())


def actors_of(
    count: int | None, address: str | None, gpus: float | None, device: str | None
) -> Actors | None:
    """The actors that were asked for; None: the runs' own processes do the clients' work.

    Where nothing is said of GPUs, and this machine has some to train on, each has its share.

    Raises:
        CommandError: something is said of actors, and not how many.
    """
    if count is None:
        for option, value in (("--ray-address", address), ("--gpus-per-actor", gpus)):
            if value is not None:
                raise CommandError(f"{option} needs --actors N: how many are to share the clients")
        return None
    if gpus is None:
        own = address is None and device_of(device).startswith("cuda")
        gpus = 1 / math.ceil(count / device_count()) if own else 0.0
    try:
        return Actors(count, address, gpus=gpus)
    except ValueError as why:
        raise CommandError(f"--gpus-per-actor: {why}") from why


def trainer_of(
    wanted: str | None, experiment: Experiment, folder: Path, device: str
) -> Trainer:
    """How the clients of a run train: as when it was begun, else as asked for.

    Raises:
        CommandError: the run was begun in another way than the one asked for.
    """
    if (folder / "experiment.json").exists():
        begun = Spec.read(folder).trainer
        if wanted not in (None, FASTEST, begun):
            raise CommandError(
                f"{folder} holds a run that was begun with --trainer {begun}, not {wanted}: "
                f"leave the option out, or name another folder with --out"
            )
        return begun
    if wanted == FASTEST:
        data, plan = experiment.data.load(experiment.clients[0].id), experiment.plan
        if plan.prepare is not None:
            data = plan.prepare(experiment.clients[0].id, experiment.factory(), data)
        return choose(experiment.factory, data.train, plan, device)
    return next((t for t in TRAINERS if t == wanted), TRAINERS[0])


@dataclass(frozen=True)
class Outcome:
    """What a study came to."""

    root: Path
    standings: Sequence[Standing]  # before it
    progress: Sequence[RunProgress]  # after it
    runs: Mapping[Path, Run]  # those that have a round, by folder
    errors: Mapping[Path, str]  # why runs failed, by folder
    page: Path | None
    seconds: float


def run_command(
    name: str,
    methods: Sequence[str],
    seeds: Sequence[int],
    rounds: int | None,
    out: Path | None,
    manner: Manner,
) -> None:
    """Raises CommandError where nothing could be run, and where something was and failed."""
    with nothing_on_stdout(manner.json):
        device = device_of(manner.device)
        rounds = rounds_of(name, rounds)
        root = out or Path("runs") / name.replace(":", ".")
        check_place(root)
        made = {s: methods_of(name, s, rounds, methods) for s in dict.fromkeys(seeds)}
        experiments = {}
        for seed, own in made.items():
            for method, experiment in own.items():
                folder = folder_of(root, Spec(name, method, seed, rounds))
                trainer = trainer_of(manner.trainer, experiment, folder, device)
                spec = Spec(name, method, seed, rounds, trainer=trainer)
                experiments[method, seed] = ((spec, folder), experiment)
        check_root(root, name, rounds)
        standings = [standing_of(job, e) for job, e in experiments.values()]
        first = next(iter(next(iter(made.values())).values()))
        head = (
            f"{name}: {plural(len(next(iter(made.values()))), 'method')}, "
            f"{plural(len(made), 'seed')}, {plural(rounds, 'round')}, "
            f"{plural(len(first.clients), 'client')}; on {device}, into {root}"
        )
        controls = sorted({m for own in made.values() for m, e in own.items() if e.control})
        outcome = _carry_out(root, standings, device, manner, head)
    _conclude(outcome, manner, controls)


def resume_command(folder: Path, manner: Manner) -> None:
    """Raises CommandError where nothing could be run, and where something was and failed."""
    with nothing_on_stdout(manner.json):
        device = device_of(manner.device)
        jobs = [(Spec.read(f), f) for f in run_folders(folder)]
        made: dict[tuple[str, int, int], Mapping[str, Experiment]] = {}
        standings = []
        for spec, place in jobs:
            if is_finished(place):
                standings.append(Standing((spec, place), True, True, spec.rounds))
                continue
            key = spec.target, spec.seed, rounds_of(spec.target, spec.rounds)
            if key not in made:
                made[key] = methods_of(*key)
            experiment = pick_method(made[key], spec.method, spec.target)
            standings.append(standing_of((spec, place), experiment))
        head = f"{folder}: {plural(len(jobs), 'run')}; on {device}"
        outcome = _carry_out(folder, standings, device, manner, head)
    _conclude(outcome, manner)


def _carry_out(
    root: Path,
    standings: Sequence[Standing],
    device: str,
    manner: Manner,
    head: str,
) -> Outcome:
    """Run what is not finished; raises CommandError if somebody stops it."""
    err = console(stderr=True)
    if not manner.quiet:
        err.print(Text(head, "bold"), soft_wrap=True)
        _say_standings(err, standings)
    for standing in standings:
        for line in standing.damaged:  # also when quiet: it is a loss
            err.print(Text(f"! {line}", "yellow"), soft_wrap=True)
    jobs = [s.job for s in standings]
    display = Display(Console(quiet=True) if manner.quiet else err, manner.processes)
    began = time.monotonic()
    try:
        with _terminated_is_stopped(), display:
            progress = run_study(
                jobs,
                manner.processes,
                device=device,
                actors=manner.actors,
                watch=display.watch,
                complain=_told_already,
            )
    except (KeyboardInterrupt, TerminatedError) as why:
        code = INTERRUPTED if isinstance(why, KeyboardInterrupt) else 128 + signal.SIGTERM
        raise CommandError(_how_to_go_on(root, jobs), code) from why
    except (ActorsError, ImportError) as why:  # Ray does not start, or is not there
        raise CommandError(reason(why), FAILED) from why
    runs, errors = {}, {r.folder: r.error for r in progress if r.error is not None}
    for end in progress:
        if not (end.folder / "run.json").exists():
            continue
        run = read_run(end.folder)
        if run.rounds:
            runs[end.folder] = run
        if end.done and final_evaluation(run) is None:
            errors.setdefault(end.folder, _why_nothing(run))
    page = None
    if manner.report and runs:
        page = root / "report.html"
        write_page(list(runs.values()), page)
    return Outcome(root, standings, progress, runs, errors, page, time.monotonic() - began)


def _say_standings(err: Console, standings: Sequence[Standing]) -> None:
    done = [s for s in standings if s.finished]
    if done:
        what = "it is" if len(done) == 1 else "they are"
        names = listed([_named(s.job[0]) for s in done])
        err.print(Text(f"  finished already, so {what} not run again: {names}", "dim"))
    for s in standings:
        if s.begun and not s.finished:
            spec = s.job[0]
            err.print(Text(f"  {_named(spec)} goes on {_from(s)}", "dim"), soft_wrap=True)


def _from(s: Standing) -> str:
    if s.round == 0:
        return "from the start: it has no whole checkpoint" + ("" if s.damaged else " yet")
    if s.round == s.job[0].rounds:
        return f"after its {s.round} rounds, with the closing evaluation"
    return f"after {s.round} of {plural(s.job[0].rounds, 'round')}"


def _named(spec: Spec) -> str:
    return f"{spec.method} seed {spec.seed}"


def _told_already(line: str) -> None:
    """Damage was found and said before the run began."""


class TerminatedError(Exception):
    """SIGTERM came."""


@contextmanager
def _terminated_is_stopped() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise TerminatedError

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _how_to_go_on(root: Path, jobs: Sequence[Job]) -> str:
    done = sum(is_finished(folder) for _, folder in jobs)
    return (
        f"stopped with {done} of {plural(len(jobs), 'run')} finished; nothing that was done is "
        f"lost but the rounds that were under way. Go on with: fedmoe resume {root}"
    )


def _conclude(outcome: Outcome, manner: Manner, controls: Sequence[str] = ()) -> None:
    """Show what came out; raise CommandError if a run failed."""
    if manner.json:
        write_json(_as_json(outcome))
    else:
        show(list(outcome.runs.values()))
        _say_end(console(), outcome, controls)
    if outcome.errors:
        lines = [f"{folder.name}: {why}" for folder, why in outcome.errors.items()]
        raise CommandError(
            f"{len(lines)} of {plural(len(outcome.progress), 'run')} failed.\n"
            + "\n".join(lines)
            + f"\nOnce that is mended, go on with: fedmoe resume {outcome.root}",
            FAILED,
        )


def _why_nothing(run: Run) -> str:
    reasons = [f.reason for r in run.rounds for f in (*r.failed, *r.refused)]
    why = f"; the first of {len(reasons)} failures: {reasons[0]}" if reasons else ""
    return f"it ended, but no client could be measured{why}"


def _say_end(out: Console, outcome: Outcome, controls: Sequence[str]) -> None:
    if controls:
        text = f"· {listed(controls)}: controls, which know what a server cannot."
        out.print(Text(text, "dim"))
    partitions: dict[str, list[str]] = {}
    for run in outcome.runs.values():
        row = result_row(run, "")
        if row["failures"] or row["refusals"]:
            out.print(Text(f"! {_failures(run, row)}", "yellow"), soft_wrap=True)
        seeds = partitions.setdefault(run.info.partition_hash, [])
        if str(run.info.seed) not in seeds:
            seeds.append(str(run.info.seed))
    out.print()
    for digest, seeds in partitions.items():
        word = "seed" if len(seeds) == 1 else "seeds"
        out.print(f"partition  {digest}  ({word} {listed(seeds)})", soft_wrap=True, markup=False)
    if outcome.page is not None:
        out.print(f"report     {outcome.page}", soft_wrap=True, markup=False)
    if any(not s.finished for s in outcome.standings):
        out.print(f"time       {duration(outcome.seconds)}")


def _failures(run: Run, row: Row) -> str:
    reasons = [f.reason for r in run.rounds for f in (*r.failed, *r.refused)]
    return (
        f"{run.info.method} seed {run.info.seed}: clients failed {row['failures']} times and were "
        f"refused {row['refusals']} times; first: {reasons[0]}"
    )


def _as_json(outcome: Outcome) -> Row:
    before = {s.job[1]: s for s in outcome.standings}
    rows = []
    for end in outcome.progress:
        standing, run = before[end.folder], outcome.runs.get(end.folder)
        row: Row = {
            "folder": str(end.folder),
            **asdict(end.spec),
            "finished": end.done,
            "finished_before": standing.finished,
            "went_on_from_round": standing.round if standing.begun else None,
            "damaged_checkpoints": list(standing.damaged),
            "error": outcome.errors.get(end.folder),
            "model_hash": run.rounds[-1].model_hash if run else None,
        }
        rows.append(row if run is None else row | result_row(run, run.info.experiment))
    return {
        "folder": str(outcome.root),
        "report": None if outcome.page is None else str(outcome.page),
        "seconds": outcome.seconds,
        "runs": rows,
    }
