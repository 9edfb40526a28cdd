"""Many runs, told as protocols x methods x seeds, and their rows in a file of results.

A sweep owns a folder, ROOT/PROTOCOL/METHOD-seedS for each run, with `sweep.json` at its root and
`definition.json` beside each run: the settings that it was made under. The file of results is
committed and the runs are not, so a row counts as done for as long as its settings are today's
(see definition.py), whether its run is on this machine or not. What was made under other settings
is never shown: the run is set aside in ROOT/superseded, the row is dropped, and the run is made
again.
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedmoe.experiments.definition import Definition, definition_of
from fedmoe.experiments.experiment import Experiment
from fedmoe.experiments.run import Spec
from fedmoe.experiments.study import RunProgress, alone, folder_of, run_study
from fedmoe.experiments.table import UnknownNameError, default_rounds, find_experiment
from fedmoe.federated.cohort import Trainer, supported
from fedmoe.report.atomic import write_atomically
from fedmoe.report.log import RunInfo, read_run
from fedmoe.report.measures import Row
from fedmoe.report.rows import full_row, read_rows, write_rows

FORMAT = 1  # of a sweep's folder; raise it when what is in there changes its meaning

Key = tuple[str, str, int]  # protocol, method, seed: one row of results
Say = Callable[[str], None]


@dataclass(frozen=True)
class Setting:
    """One protocol of a sweep: which experiment, and for how long."""

    target: str  # of the table of experiments, or module:function
    rounds: int | None = None  # None: as many as the experiment has when nobody asks
    arguments: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""  # the protocol in rows and folders; empty: the target
    methods: tuple[str, ...] = ()  # these alone; empty: all that the experiment has

    @property
    def protocol(self) -> str:
        return self.label or self.target


@dataclass(frozen=True)
class Job:
    """One run of a sweep, and what it must agree with to count as this run."""

    protocol: str
    spec: Spec
    folder: Path
    definition: Definition
    experiment: str
    partition_hash: str
    memory: tuple[tuple[int, int | None], ...]  # (client, bytes)
    control: bool

    @property
    def key(self) -> Key:
        return self.protocol, self.spec.method, self.spec.seed

    def would_give(self, row: Row) -> bool:
        """Whether today's settings would give this row of results again."""
        made = row.get("settings")
        return made is not None and not self.definition.differs_from(made)

    def agrees(self, info: RunInfo) -> bool:
        """Whether a run's log says nothing that this run would not; it does not say everything."""
        made = (info.experiment, info.method, info.seed, info.rounds, info.partition_hash)
        asked = (self.experiment, self.spec.method, self.spec.seed, self.spec.rounds)
        memory = tuple((c.id, c.memory_bytes) for c in info.clients)
        return made == (*asked, self.partition_hash) and memory == self.memory


@dataclass(frozen=True)
class Plan:
    """Every run that a sweep's protocols have, and the protocols that cannot be made here."""

    jobs: Sequence[Job]
    missing: Mapping[str, str]  # protocol -> why not

    def only(self, methods: Sequence[str]) -> "Plan":
        """The plan of these methods; a sweep of it keeps rows of no others."""
        return Plan([job for job in self.jobs if job.spec.method in methods], self.missing)

    def of_methods(self, methods: Sequence[str]) -> list[Job]:
        """The jobs of these methods, of all if none are named; a protocol may lack some.

        Raises:
            UnknownNameError: no protocol has such a method.
        """
        known = {job.spec.method for job in self.jobs}
        if unknown := [m for m in methods if m not in known]:
            raise UnknownNameError(
                f"methods must be among {', '.join(sorted(known))}, got {unknown[0]!r}"
            )
        return [job for job in self.jobs if not methods or job.spec.method in methods]


def plan_sweep(
    settings: Sequence[Setting],
    seeds: Sequence[int],
    root: Path,
    trainer: Trainer = "one-by-one",
) -> Plan:
    """Make every experiment once per protocol and seed; loads no client's data.

    Args:
        trainer: of runs that begin and whose model and plan it supports; the others' is one by one.
    """
    jobs: list[Job] = []
    missing = {}
    for setting in settings:
        try:
            jobs += [job for seed in seeds for job in _jobs_of(setting, seed, root, trainer)]
        except (OSError, ValueError) as why:  # no such experiment, or its data are not here
            missing[setting.protocol] = str(why)
    return Plan(jobs, missing)


def _jobs_of(setting: Setting, seed: int, root: Path, trainer: Trainer) -> Iterator[Job]:
    rounds = setting.rounds or default_rounds(setting.target)
    make = find_experiment(setting.target)
    for method, experiment in make(seed=seed, rounds=rounds, **setting.arguments).items():
        if setting.methods and method not in setting.methods:
            continue
        can = supported(experiment.factory(), experiment.plan, trainer) is None
        way = trainer if can else Spec.trainer
        spec = Spec(setting.target, method, seed, rounds, setting.arguments, way)
        yield _job(setting.protocol, spec, experiment, root)


def _job(protocol: str, spec: Spec, experiment: Experiment, root: Path) -> Job:
    return Job(
        protocol=protocol,
        spec=spec,
        folder=folder_of(root / protocol.replace(":", "."), spec),
        definition=definition_of(spec, experiment),
        experiment=experiment.name,
        partition_hash=experiment.data.partition_hash,
        memory=tuple((c.id, c.memory_bytes) for c in experiment.listed),
        control=experiment.control,
    )


def run_sweep(
    plan: Plan,
    root: Path,
    results: Path,
    *,
    methods: Sequence[str] = (),
    others: Sequence[Path] = (),
    again: bool = False,
    trust: bool = False,
    workers: int = 1,
    every_s: float = 15.0,
    say: Say = print,
    after: Callable[[Sequence[Row]], None] = lambda rows: None,
    published: Sequence[Row] = (),
) -> dict[Path, str]:
    """Run what is not done, `workers` at a time, and keep its rows in the file `results`.

    Several processes may sweep the same root: a run belongs to the one that began it.

    Args:
        methods: run these alone; the rows of the plan's other methods are kept up all the same.
        others: further files of results whose rows count as done.
        again: run even what is done; earlier runs are set aside.
        trust: take runs and rows of other settings as today's, as far as their logs agree: for
            settings that were renamed or moved, and change nothing.
        after: called with all rows of the file whenever some are new.
        published: figures from elsewhere that stand in the file too; others of their protocols go.

    Returns:
        Why each run that is asked for is not done, by its folder.

    Raises:
        ValueError: the root is of another version, or a file of results is not one.
    """
    open_root(root)
    asked = plan.of_methods(methods)
    undone: dict[Path, str] = {}
    for job in asked:
        try:
            _settle(job, root, again, trust, say)
        except ValueError as why:
            undone[job.folder] = str(why)
    stale = {job.key for job in asked} if again else set()
    rows = _known_rows(plan, (*others, results), stale, asked if trust else ())
    for job in plan.jobs:
        try:
            row = None if job.folder in undone else finished_row(job)
        except ValueError as why:  # its log is damaged
            undone[job.folder] = str(why)
            continue
        if row is not None:
            rows[job.key] = row

    def keep(new: Mapping[Key, Row], dropped: Iterable[Key] = ()) -> None:
        with _held(results.parent):
            after(_merge(results, plan, new, set(dropped), say, published))

    keep(rows, stale - rows.keys())
    todo = [j for j in asked if j.key not in rows and j.folder not in undone]
    for job in todo:
        _stamp(job)

    def watch(progress: list[RunProgress]) -> None:
        ended = {p.folder for p in progress if p.done}
        new: dict[Key, Row] = {}
        for job in todo:
            if job.folder in ended and job.key not in rows and (row := finished_row(job)):
                new[job.key] = row
                say(f"done {job.folder}: personal accuracy {row['personal_mean'] or 0:.4f}")
        if new:
            rows.update(new)
            keep(new)

    end = run_study([(j.spec, j.folder) for j in todo], workers, watch=watch, every_s=every_s)
    return undone | {p.folder: p.error or "it was not finished" for p in end if not p.done}


def open_root(root: Path) -> None:
    """Make a sweep's folder, or make sure that it is one that this version can read.

    Raises:
        ValueError: it is of another version, or the folder of a run.
    """
    path = root / "sweep.json"
    if (root / "run.json").exists() or (root / "experiment.json").exists():
        raise ValueError(f"{root} is the folder of one run: name a folder for a whole sweep")
    if not path.exists():
        root.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({"format": FORMAT}) + "\n")
    try:
        version = json.loads(path.read_text(encoding="utf-8"))["format"]
    except (ValueError, KeyError, TypeError) as why:
        raise ValueError(f"{path} must be a JSON object with a format, and is damaged") from why
    if version != FORMAT:
        raise ValueError(
            f"{root} holds a sweep of format {version!r}, and this fedmoe reads format {FORMAT} "
            f"only: go on with the version that began it, or name another folder"
        )


def finished_row(job: Job) -> Row | None:
    """The row of a run that is finished, and was made under its job's settings; or None."""
    made = read_settings(job.folder)
    if made is None or job.definition.differs_from(made) or not (job.folder / "run.json").exists():
        return None
    run = read_run(job.folder)
    if not run.rounds or run.rounds[-1].phase != "final":
        return None
    ended = (job.folder / "rounds.jsonl").stat().st_mtime
    date = datetime.fromtimestamp(ended, UTC).date().isoformat()
    return full_row(run, job.protocol) | {"date": date} | _marks(job)


def _marks(job: Job) -> Row:
    """What a row says of how its run is made, today."""
    settings = dict(job.definition.settings)
    return {"control": job.control, "definition": job.definition.hash, "settings": settings}


def read_settings(folder: Path) -> Mapping[str, str] | None:
    """The settings under which the run in a folder was made; None where nobody wrote them down.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / "definition.json"
    if not path.exists():
        return None
    try:
        made: Mapping[str, str] = json.loads(path.read_text(encoding="utf-8"))["settings"]
        return dict(made)
    except (ValueError, KeyError, TypeError) as why:
        raise ValueError(f"{path} is damaged: remove {folder}, to run it again") from why


def _settle(job: Job, root: Path, again: bool, trust: bool, say: Say) -> None:
    """Make sure that what is in the job's folder, if anything, is this job's run."""
    if not job.folder.exists():
        return
    made = read_settings(job.folder)
    differs = [] if made is None else job.definition.differs_from(made)
    if made is not None and not differs and not again:
        return
    with alone(job.folder):
        if not (job.folder / "run.json").exists():
            return
        # Runs that no sweep began are taken over, if nothing in their logs speaks against it.
        if not again and (made is None or trust) and job.agrees(read_run(job.folder).info):
            say(f"taken over as made by today's settings: {job.folder}")
            _stamp(job)
            return
        why = f"made under another {', '.join(differs)}" if differs else "to be run again"
        say(f"set aside {job.folder}: {why if made or again else 'its log is of another run'}")
        _set_aside(job.folder, root / "superseded" / job.folder.parent.name)


def _set_aside(folder: Path, place: Path) -> None:
    place.mkdir(parents=True, exist_ok=True)
    taken = {p.name for p in place.iterdir()}
    number = next(n for n in range(1, len(taken) + 2) if f"{folder.name}-{n}" not in taken)
    folder.rename(place / f"{folder.name}-{number}")


def _stamp(job: Job) -> None:
    """Write down the settings of the run in the job's folder."""
    job.spec.write(job.folder)
    text = json.dumps({"settings": dict(job.definition.settings)}, indent=1)
    write_atomically(job.folder / "definition.json", text + "\n")


def _known_rows(
    plan: Plan, files: Iterable[Path], stale: set[Key], trusted: Iterable[Job]
) -> dict[Key, Row]:
    """The rows of these files that today's settings would give again, or are trusted to."""
    today = {job.key: job for job in plan.jobs if job.key not in stale}
    trusting = {job.key for job in trusted}
    known: dict[Key, Row] = {}
    for row in (row for path in files for row in read_rows(path)):
        job = today.get(key_of(row))
        if job is None or row.get("published"):
            continue
        made = row.get("rounds"), row.get("partition_hash")
        agrees = "settings" in row and made == (job.spec.rounds, job.partition_hash)
        if job.would_give(row) or (agrees and job.key in trusting):
            known[job.key] = row | _marks(job)
    return known


def _merge(
    path: Path,
    plan: Plan,
    new: Mapping[Key, Row],
    dropped: set[Key],
    say: Say,
    published: Sequence[Row],
) -> list[Row]:
    """Write the rows that are valid today, those of other processes too; returns them."""
    today = {job.key: job for job in plan.jobs}
    planned = {(protocol, seed) for protocol, _, seed in today}

    def valid(row: Row, key: Key) -> bool:
        if key in dropped or "settings" not in row:
            return False
        # What this plan does not speak of stays, for a plan that does.
        return (key[0], key[2]) not in planned or (key in today and today[key].would_give(row))

    found = read_rows(path)
    told = {row["protocol"] for row in published}
    elsewhere = [r for r in found if r.get("published") and r["protocol"] not in told]
    old = {key_of(row): row for row in found if not row.get("published")}
    kept = {key: row for key, row in old.items() if valid(row, key)}
    if gone := [f"{p} {m} seed {s}" for p, m, s in old if (p, m, s) not in kept.keys() | new]:
        say(f"dropped from {path.name}, made under other settings: {', '.join(gone)}")
    rows = [*elsewhere, *published, *_in_order(kept | dict(new), plan)]
    write_rows(path, rows)
    return rows


def _in_order(rows: Mapping[Key, Row], plan: Plan) -> list[Row]:
    """By protocol as they came, by method as the plan has them, and by seed."""
    protocols = list(dict.fromkeys(protocol for protocol, _, _ in rows))
    methods = [*(j.spec.method for j in plan.jobs), *(method for _, method, _ in rows)]
    place = {method: i for i, method in enumerate(dict.fromkeys(methods))}
    order = sorted(rows, key=lambda k: (protocols.index(k[0]), place[k[1]], k[2]))
    return [rows[key] for key in order]


def key_of(row: Row) -> Key:
    return row["protocol"], row["method"], row.get("seed", -1)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Wait for, and hold, the lock of a folder of results."""
    folder.mkdir(parents=True, exist_ok=True)
    place = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(place, fcntl.LOCK_EX)
        yield
    finally:
        os.close(place)
