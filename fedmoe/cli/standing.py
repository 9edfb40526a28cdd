"""Where runs stand before they go on: what is finished, what is whole, what may not be mixed."""

from dataclasses import dataclass
from pathlib import Path

from fedmoe.checkpoint import newest_checkpoint
from fedmoe.cli.making import check
from fedmoe.cli.trouble import CommandError
from fedmoe.experiments.experiment import Experiment
from fedmoe.experiments.run import Spec
from fedmoe.experiments.study import is_finished
from fedmoe.report.log import Run, read_run
from fedmoe.state import split_state

Job = tuple[Spec, Path]


@dataclass(frozen=True)
class AnyState:
    """A state of which nothing is read, so that every whole checkpoint holds one."""


@dataclass(frozen=True)
class Standing:
    """Where a run stands before it goes on."""

    job: Job
    finished: bool
    begun: bool
    round: int  # that comes next
    damaged: tuple[str, ...] = ()  # checkpoints that are not whole, and why


def run_folders(folder: Path) -> list[Path]:
    if not folder.exists():
        raise CommandError(f"{folder} does not exist: name a run's folder, or one that holds runs")
    if (folder / "experiment.json").exists():
        return [folder]
    found = sorted(path.parent for path in folder.glob("*/experiment.json"))
    if not found:
        raise CommandError(
            f"{folder} holds no run: neither experiment.json nor */experiment.json is there; "
            f"`fedmoe run NAME --out {folder}` begins one"
        )
    return found


def check_root(root: Path, name: str, rounds: int) -> None:
    """Raise CommandError if `root` holds runs of something else."""
    if (root / "experiment.json").exists() or (root / "run.json").exists():
        raise CommandError(
            f"{root} is the folder of one run, and --out must be a folder of runs; name "
            f"{root.parent}, or `fedmoe resume {root}`"
        )
    for path in sorted({p.parent for n in ("experiment", "run") for p in root.glob(f"*/{n}.json")}):
        spec = Spec.read(path)
        if spec.target != name:
            raise CommandError(
                f"{root} holds runs of {spec.target!r} ({path.name}), not of {name!r}; "
                f"name another folder with --out"
            )
        if spec.rounds != rounds:
            raise CommandError(
                f"{root} holds runs of {spec.rounds} rounds ({path.name}), not of {rounds}; "
                f"give --rounds {spec.rounds}, or name another folder with --out"
            )


def standing_of(job: Job, experiment: Experiment) -> Standing:
    """How far a run is, once everything about it has been checked."""
    spec, folder = job
    begun = (folder / "run.json").exists()
    if begun and is_finished(folder):
        _check_same(read_run(folder), spec, experiment, folder)
        return Standing(job, True, True, spec.rounds)
    check(experiment)
    if not begun:
        return Standing(job, False, False, 0)
    _check_same(read_run(folder), spec, experiment, folder)
    damaged: list[str] = []
    state = experiment.strategy.init(split_state(experiment.factory()), experiment.clients)
    found = newest_checkpoint(folder / "checkpoints", type(state), damaged.append)
    whole = newest_checkpoint(folder / "checkpoints", AnyState)
    if whole is not None and (found is None or found[0] < whole[0]):
        raise CommandError(
            f"{folder}: {damaged[0].split('; falling')[0]}, although its content is whole: the "
            f"code of {spec.target} has changed since. Undo that, or begin anew in another folder."
        )
    return Standing(job, False, True, 0 if found is None else found[0], tuple(damaged))


def _check_same(run: Run, spec: Spec, experiment: Experiment, folder: Path) -> None:
    """Raise CommandError if a folder's log is of another run than would go on in it."""
    info = run.info
    was = (info.experiment, info.method, info.seed, info.rounds)
    now = (experiment.name, spec.method, spec.seed, spec.rounds)
    if was != now:
        words = "experiment {!r}, method {!r}, seed {}, {} rounds"
        raise CommandError(
            f"{folder} is a run of {words.format(*was)}, not of {words.format(*now)}; "
            f"name another folder"
        )
    if info.partition_hash != experiment.data.partition_hash:
        raise CommandError(
            f"{folder} was begun on partition {info.partition_hash}, and {spec.target} with seed "
            f"{spec.seed} now gives {experiment.data.partition_hash}: the data, or how they are "
            f"dealt out, have changed. Undo that, or name another folder."
        )
