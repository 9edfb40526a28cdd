"""Experiments by the name that was typed, made and checked before anything is written."""

import inspect
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedmoe.cli.trouble import BAD_INPUT_ERRORS, VARIABLE, CommandError, reason
from fedmoe.device import pick_device
from fedmoe.experiments.experiment import Experiment
from fedmoe.experiments.run import check_budgets
from fedmoe.experiments.table import default_rounds, find_experiment, pick_method
from fedmoe.state import split_state

LEAST_FREE_BYTES = 100 * 2**20


def device_of(wanted: str | None) -> str:
    """Where to train: what was asked for, else a GPU if there is one, else the CPU.

    Raises:
        CommandError: it is no device that this machine has.
    """
    if wanted is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", wanted):
        raise CommandError(f"--device must be cpu, cuda or cuda:NUMBER, got {wanted!r}")
    return str(pick_device(wanted))


def rounds_of(name: str, rounds: int | None) -> int:
    """The rounds that were asked for, or else the experiment's own.

    Raises:
        CommandError: there is no such experiment, or it is not a function of seed and rounds.
    """
    wanted = "an experiment is a function of a seed and of rounds, both with a default"
    try:
        own = default_rounds(name)
        parameters = inspect.signature(find_experiment(name)).parameters
    except BAD_INPUT_ERRORS:
        raise
    except Exception as why:
        if isinstance(why, KeyError | TypeError):
            raise CommandError(f"{name} has no default number of rounds: {wanted}") from why
        raise CommandError(_own_fault(name, why)) from why
    if "seed" not in parameters:
        raise CommandError(f"{name} takes no seed: {wanted}")
    return own if rounds is None else rounds


def methods_of(
    name: str, seed: int, rounds: int, wanted: Sequence[str] = ()
) -> Mapping[str, Experiment]:
    """An experiment's methods by name, or those of them that are wanted.

    Raises:
        CommandError: it cannot be made, or is not what an experiment must be.
        UnknownNameError: it lacks a wanted method.
    """
    make = find_experiment(name)
    try:
        methods = make(seed=seed, rounds=rounds)
    except BAD_INPUT_ERRORS as why:
        raise CommandError(f"{name} cannot be made for seed {seed}: {reason(why)}") from why
    except Exception as why:
        raise CommandError(_own_fault(name, why)) from why
    if not isinstance(methods, Mapping) or not methods:
        raise CommandError(
            f"{name} must return a mapping from method names to experiments, "
            f"got {type(methods).__name__} {methods!r:.60}"
        )
    for method, experiment in methods.items():
        if not isinstance(experiment, Experiment):
            raise CommandError(
                f"{name} must return experiments, got a {type(experiment).__name__} for {method!r}"
            )
        if experiment.schedule.rounds != rounds or experiment.schedule.seed != seed:
            raise CommandError(
                f"{name} must pass on what it is given: {method!r} was to have {rounds} rounds "
                f"and seed {seed}, and its schedule has {experiment.schedule.rounds} rounds and "
                f"seed {experiment.schedule.seed}"
            )
        if experiment.method != method:
            raise CommandError(
                f"{name} must call each method alike, got {method!r} for one that calls itself "
                f"{experiment.method!r}: dataclasses.replace(..., method={method!r}) mends it"
            )
        if "/" in method or method.startswith("."):
            raise CommandError(f"{name}: a method's name becomes a folder's, got {method!r}")
    if not wanted:
        return methods
    return {m: pick_method(methods, m, name) for m in dict.fromkeys(wanted)}


def check(experiment: Experiment) -> None:
    """Let the strategy refuse what cannot go well, such as a budget below one expert per layer.

    Raises:
        CommandError: it does.
    """
    try:
        model = split_state(experiment.factory())
        check_budgets(experiment, model)
        state = experiment.strategy.init(model, experiment.clients)
        experiment.strategy.assign(state, experiment.schedule.participants(0, experiment.clients))
    except BAD_INPUT_ERRORS as why:
        raise CommandError(f"{experiment.name}, {experiment.method}: {reason(why)}") from why


def check_place(folder: Path) -> None:
    """Make sure that a folder can be written to, or made.

    Raises:
        CommandError: it is a file, cannot be written to, or the disk is full.
    """
    if folder.exists() and not folder.is_dir():
        raise CommandError(f"{folder} is a file: name a folder")
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        raise CommandError(f"{folder} cannot be made: {there} is a file")
    free = shutil.disk_usage(there).free
    if free < LEAST_FREE_BYTES:
        raise CommandError(
            f"{there} must have at least {LEAST_FREE_BYTES // 2**20} MiB free, got "
            f"{free // 2**20}; make room, or name another folder"
        )


def _own_fault(name: str, why: Exception) -> str:
    return f"{name} cannot be made: {type(why).__name__}: {reason(why)}; {VARIABLE}=1 shows where"
