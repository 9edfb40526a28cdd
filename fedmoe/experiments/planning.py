"""What a run will cost, told before it starts: experts that fit, memory, bytes, seconds."""

import time
from collections import Counter
from dataclasses import dataclass

import torch

from fedmoe.data.examples import Examples
from fedmoe.experiments.experiment import Experiment
from fedmoe.experiments.memory import peak_bytes
from fedmoe.experiments.run import without
from fedmoe.federated.local import train
from fedmoe.federated.select import experts_that_fit
from fedmoe.rng import torch_generator
from fedmoe.state import build_part, load_state, split_state
from fedmoe.types import Assignment, ExpertId, MoEState, SubMoE
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
    bytes_down: int  # a round
    bytes_up: int  # a round
    seconds: float  # a round of local training, measured with a few batches on this machine


def plan_clients(
    experiment: Experiment, device: torch.device | str = "cpu"
) -> list[ClientPlan]:
    """A plan per client, in order of id.

    Raises:
        ValueError: a client's budget does not hold one expert per layer.
    """
    model = split_state(experiment.factory())
    given = _given(experiment, model)
    known: dict[tuple[tuple[int, int], ...], tuple[int, float]] = {}
    plans = []
    for c in experiment.clients:
        count = experts_that_fit(model, c.memory_bytes)
        part = given.get(c.id, _first_experts(model, count))
        shape = tuple(sorted(Counter(e.layer for e in part).items()))
        if shape not in known:
            known[shape] = (
                peak_bytes(experiment, part, device),
                _seconds_per_batch(experiment, model, part, device),
            )
        memory, seconds = known[shape]
        sent = without(Assignment(0, model.only(part), part), experiment.plan.personal)
        size = message_bytes(sent)
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
                training_bytes=memory,
                bytes_down=size,
                bytes_up=size,
                seconds=seconds * batches * epochs,
            )
        )
    return plans


def _given(experiment: Experiment, model: MoEState) -> dict[int, SubMoE]:
    """What each client trains, by a strategy that knows it before the first round."""
    state = experiment.strategy.init(model, experiment.clients)
    if experiment.strategy.phase(state) != "train":
        return {}
    return {
        c: a.sub_moe for c, a in experiment.strategy.assign(state, experiment.clients).items()
    }


def _first_experts(model: MoEState, count: int) -> SubMoE:
    by_layer: dict[int, list[ExpertId]] = {}
    for e in sorted(model.experts):
        by_layer.setdefault(e.layer, []).append(e)
    return frozenset(e for experts in by_layer.values() for e in experts[:count])


def _seconds_per_batch(
    experiment: Experiment, model: MoEState, part: SubMoE, device: torch.device | str
) -> float:
    x, y = experiment.data.load(experiment.clients[0].id).train
    size = experiment.plan.batch_size
    sample = Examples(x[: size * SAMPLE_STEPS], y[: size * SAMPLE_STEPS])
    net = build_part(experiment.factory, part)
    load_state(net, model.only(part))
    net.to(device)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        train(net, sample, experiment.plan, torch_generator(0), torch.device(device))
        times.append(time.perf_counter() - started)
    epochs = sum(p.epochs for p in experiment.plan.phases)
    return sorted(times)[1] / max(1, -(-len(sample.y) // size)) / epochs


def _bytes(state: MoEState) -> int:
    parts = (state.shared, *state.experts.values())
    return sum(t.numel() * t.element_size() for part in parts for t in part.values())
