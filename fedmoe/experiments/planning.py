"""What a run will cost, told before it starts: experts that fit, memory, bytes, seconds."""

import time
from collections import Counter
from dataclasses import dataclass, replace

import torch

from fedmoe.experiments.experiment import Experiment
from fedmoe.experiments.memory import (
    Step,
    first_assignments,
    first_examples,
    measured_step,
    task_of,
)
from fedmoe.experiments.run import without
from fedmoe.federated.select import experts_that_fit
from fedmoe.state import other_than, split_state, take_names
from fedmoe.types import Assignment, ClientUpdate, ExpertId, MoEState, SubMoE
from fedmoe.wire.messages import message_bytes

SAMPLE_STEPS = 4  # batches that are timed for the estimate


@dataclass(frozen=True)
class ClientPlan:
    """One client's share of a run. Where experts are chosen on the way, it may get fewer."""

    client: int
    group: str | None
    memory_bytes: int | None  # budget for parameters; None: no limit
    experts_per_layer: int  # that fit the budget
    experts_held: int  # over all layers: those that fit, or what the strategy gives whatever fits
    parameter_bytes: int  # of the shared part and the held experts
    training_bytes: int  # peak while training, measured with one batch on this machine
    bytes_down: int  # a round, before it is coded
    bytes_up: int  # a round, before it is coded
    seconds: float  # a round of local training, measured with a few batches on this machine


def plan_clients(
    experiment: Experiment, device: torch.device | str = "cpu"
) -> list[ClientPlan]:
    """A plan for each client that is listed, in order of id.

    Raises:
        ValueError: a client's budget does not hold one expert per layer.
    """
    model = split_state(experiment.factory())
    assigned = first_assignments(experiment, model)
    known: dict[tuple[tuple[int, int], ...], tuple[Step, float]] = {}
    plans = []
    for c in experiment.listed:
        count = experts_that_fit(model, c.memory_bytes)
        given = assigned.get(c.id)
        if given is None:  # its experts are chosen on the way
            part = _first_experts(model, count)
            given = Assignment(0, model.only(part), part)
        part = given.sub_moe
        shape = tuple(sorted(Counter(e.layer for e in part).items()))
        if shape not in known:
            known[shape] = _measured(experiment, model, given, device)
        step, seconds = known[shape]
        batches = -(-c.num_examples // experiment.plan.batch_size)
        epochs = sum(p.epochs for p in experiment.plan.phases)
        plans.append(
            ClientPlan(
                client=c.id,
                group=experiment.data.groups.get(c.id),
                memory_bytes=c.memory_bytes,
                experts_per_layer=count,
                experts_held=len(part),
                parameter_bytes=_bytes(model.only(part)),
                training_bytes=step.peak_bytes,
                bytes_down=message_bytes(_sent(experiment, given)),
                bytes_up=message_bytes(_answer(experiment, given, step)),
                seconds=seconds * batches * epochs,
            )
        )
    return plans


def _sent(experiment: Experiment, given: Assignment) -> Assignment:
    """What goes down in a round: what is sent once is with the client already."""
    return without(replace(given, once={}), experiment.plan.personal)


def _answer(experiment: Experiment, given: Assignment, step: Step) -> ClientUpdate:
    """What comes up: the trained part, and what the method sends beside it."""
    sent, still = _sent(experiment, given).model, experiment.plan.frozen
    trained = take_names(sent, other_than(still))
    return ClientUpdate(0, 0, trained, step.trained.profile, {}, step.trained.extra)


def _measured(
    experiment: Experiment, model: MoEState, given: Assignment, device: torch.device | str
) -> tuple[Step, float]:
    """One batch for the memory, and a few for the time of each."""
    size, part, method = experiment.plan.batch_size, given.sub_moe, experiment.plan.method
    step = measured_step(experiment, part, size, given.extra, device)
    few = first_examples(experiment, size * SAMPLE_STEPS)
    own, kept = model.only(part), step.trained.kept
    task = task_of(experiment, own, few, given.extra, kept, torch.device(device))
    method.begin(task)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        method.train(task)
        times.append(time.perf_counter() - started)
    epochs = sum(p.epochs for p in experiment.plan.phases)
    return step, sorted(times)[1] / max(1, -(-len(few.y) // size)) / epochs


def _first_experts(model: MoEState, count: int) -> SubMoE:
    by_layer: dict[int, list[ExpertId]] = {}
    for e in sorted(model.experts):
        by_layer.setdefault(e.layer, []).append(e)
    return frozenset(e for experts in by_layer.values() for e in experts[:count])


def _bytes(state: MoEState) -> int:
    parts = (state.shared, *state.experts.values())
    return sum(t.numel() * t.element_size() for part in parts for t in part.values())
