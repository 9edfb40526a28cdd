"""Many clients' work: one after another, as it is defined, or by a faster way to the same result.

Where models are small, a step of training is mostly the calling of operations. A trainer says how
that is avoided. All train in the same order of batches and give the same update within 1e-6; not to
the bit, so one trainer does a whole run, wherever its parts run.
"""

import time
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import Literal, NamedTuple, get_args

import torch
from torch import nn

from fedmoe.data.examples import ClientData, Examples
from fedmoe.federated import batched, compiled
from fedmoe.federated.local import (
    BuildPart,
    Done,
    LocalMethod,
    LocalPlan,
    LocalTask,
    Phase,
    Trained,
    working,
)
from fedmoe.rng import torch_generator
from fedmoe.state import build_part, moe_layers
from fedmoe.types import Assignment, MoEState, SubMoE

# "one-by-one" is the definition; "batched" trains clients side by side in torch, on a CPU or a GPU;
# "compiled" runs each client's steps in one call of compiled code, whatever the method trains by
# `LocalTask.fit`. What a trainer cannot do is done one by one.
Trainer = Literal["one-by-one", "batched", "compiled"]
TRAINERS: tuple[Trainer, ...] = get_args(Trainer)

AT_ONCE = 32  # clients that "batched" trains side by side; their models are in memory together
PROBE_CLIENTS = 8  # of a measurement
PROBE_STEPS = 8
PROBE_S = 1.0
MARGIN = 1.05  # by which a way must be faster than one by one to be chosen

Load = Callable[[int, Assignment], tuple[ClientData, MoEState | None]]


class Answered(NamedTuple):
    """What a client came to: its work, or the exception that ended it."""

    client: int
    done: Done | Exception


def work_many(
    assignments: Iterable[tuple[int, Assignment]],
    factory: Callable[[], nn.Module],
    load: Load,
    plan: LocalPlan,
    seed: int,
    device: torch.device | str = "cpu",
    trainer: Trainer = "one-by-one",
) -> Iterator[Answered]:
    """Each client's `local.work`, in the order of `assignments`; no client's failure is another's.

    Args:
        load: a client's data, and what it kept after its last training; called when its turn comes.

    Raises:
        ValueError: there is no such trainer.
    """
    check_trainer(trainer)
    todo, device = iter(assignments), torch.device(device)
    size = AT_ONCE if trainer == "batched" else 1
    places = [_builder(plan, trainer) for _ in range(size)]
    while group := list(islice(todo, size)):
        begun = [
            _Work(client, a, factory, load, plan, seed, device, build)
            for (client, a), build in zip(group, places, strict=False)
        ]
        trained = _train([w.task for w in begun if w.task is not None], trainer)
        for w in begun:
            if w.task is not None:
                w.go_on(next(trained))
            assert w.done is not None
            yield Answered(w.client, w.done)


def check_trainer(trainer: str) -> None:
    """Raise ValueError where there is no such trainer."""
    if trainer not in TRAINERS:
        raise ValueError(f"trainer must be one of {', '.join(TRAINERS)}, got {trainer!r}")


def supported(
    model: nn.Module,
    plan: LocalPlan,
    trainer: Trainer = "compiled",
    device: torch.device | str = "cpu",
) -> str | None:
    """Why this trainer cannot train this model under this plan; None: it can.

    Some clients may still be trained one by one, such as those whose labels do not fit the model,
    and so may a part of what a method trains.
    """
    check_trainer(trainer)
    none = Examples(torch.empty(0), torch.empty(0, dtype=torch.int64))
    task = _task(0, model, none, plan, 0, torch.device(device))
    if trainer == "one-by-one":
        return None
    if not (plan.method.fits if trainer == "compiled" else _plain(task)):
        return f"the method {type(plan.method).__name__} trains in its own way"
    plan.method.begin(task)
    if trainer == "compiled":
        found = compiled.stages_for(task.model, task.device)
    else:
        found = batched.stages_for(task)
    return found if isinstance(found, str) else None


def choose(
    factory: Callable[[], nn.Module],
    examples: Examples,
    plan: LocalPlan,
    device: torch.device | str = "cpu",
) -> Trainer:
    """The fastest trainer for this model and plan, by a measurement of about a second, which is
    made once in a process for the same plan and shapes.

    "one-by-one" where nothing is clearly faster. Different trainers differ in the last bits: choose
    once for a run, and give all its processes what was chosen.

    Args:
        examples: some of a client's, to train on for a few steps; only their shape matters.
    """
    device = torch.device(device)
    count = min(len(examples.y), PROBE_STEPS * plan.batch_size)
    few = Examples(examples.x[:count], examples.y[:count])
    plan = replace(plan, phases=(Phase(plan.phases[0].trains),))
    model = factory()
    ways = [t for t in TRAINERS if supported(model, plan, t, device) is None]
    if len(ways) == 1:
        return ways[0]
    shapes = tuple((name, p.shape) for name, p in model.named_parameters())
    case = plan, device, few.x.shape, type(model), shapes, tuple(ways)
    if case not in _chosen:
        _chosen[case] = _measured(factory, few, plan, device, ways)
    return _chosen[case]


_chosen: dict[Hashable, Trainer] = {}


def _measured(
    factory: Callable[[], nn.Module],
    few: Examples,
    plan: LocalPlan,
    device: torch.device,
    ways: Sequence[Trainer],
) -> Trainer:
    tasks: dict[Trainer, list[LocalTask]] = {
        t: [_task(i, factory(), few, plan, i, device) for i in range(PROBE_CLIENTS)] for t in ways
    }
    for task in chain.from_iterable(tasks.values()):
        plan.method.begin(task)
    seconds: dict[Trainer, list[float]] = {t: [] for t in ways}
    began_s = time.perf_counter()
    while len(seconds[ways[0]]) < 2 or time.perf_counter() - began_s < PROBE_S / 2:
        for t in ways:
            # One by one takes as long for each.
            own = tasks[t] if t == "batched" else tasks[t][:1]
            before_s = time.perf_counter()
            for answer in _train(own, t):
                if isinstance(answer, Exception):
                    raise answer
            seconds[t].append((time.perf_counter() - before_s) / len(own))
    fastest = min(ways, key=lambda t: min(seconds[t]))
    clearly = min(seconds[fastest]) * MARGIN < min(seconds["one-by-one"])
    return fastest if clearly else "one-by-one"


def _task(
    client: int,
    model: nn.Module,
    examples: Examples,
    plan: LocalPlan,
    seed: int,
    device: torch.device,
) -> LocalTask:
    generator = torch_generator(seed)
    return LocalTask(client, model.to(device), examples, plan, generator, device, {}, {})


class _Work:
    """One client's work, which stands still where it is to train."""

    def __init__(
        self,
        client: int,
        assignment: Assignment,
        factory: Callable[[], nn.Module],
        load: Load,
        plan: LocalPlan,
        seed: int,
        device: torch.device,
        build: BuildPart,
    ) -> None:
        self.client = client
        self.task: LocalTask | None = None
        self.done: Done | Exception | None = None
        try:
            data, own = load(client, assignment)
            self.steps: Generator[LocalTask, Trained, Done] = working(
                client, assignment, factory, data, plan, own, seed, device, build
            )
            self.task = next(self.steps)
        except StopIteration as end:
            self.done = end.value
        except Exception as why:  # whatever goes wrong on a client is that client's failure
            self.done = why

    def go_on(self, trained: Trained | Exception) -> None:
        try:
            if isinstance(trained, Exception):
                raise trained
            self.steps.send(trained)
        except StopIteration as end:
            self.done = end.value
        except Exception as why:
            self.done = why


class _Place:
    """A whole model, of which one client after another gets its part: to build a part anew for each
    takes longer than the training of a small one.
    """

    def __init__(self) -> None:
        self.model: nn.Module | None = None
        self.experts: list[dict[int, nn.Module]] = []

    def build(self, factory: Callable[[], nn.Module], sub_moe: SubMoE) -> nn.Module:
        """As `state.build_part`; what was built before must be done with."""
        if self.model is None:
            self.model = factory()
            self.experts = [
                {int(e): expert for e, expert in moe.experts.items()}
                for _, moe in moe_layers(self.model)
            ]
        for e in sorted(sub_moe):
            if not 0 <= e.layer < len(self.experts) or e.expert not in self.experts[e.layer]:
                return build_part(factory, sub_moe)  # which says what is wrong
        for layer, (_, moe) in enumerate(moe_layers(self.model)):
            held = sorted(e.expert for e in sub_moe if e.layer == layer)
            moe.experts = nn.ModuleDict({str(e): self.experts[layer][e] for e in held})
            moe.hold(held)
        for p in self.model.parameters():
            p.requires_grad_(True)
            p.grad = None
        return self.model


def _builder(plan: LocalPlan, trainer: Trainer) -> BuildPart:
    """Others than the plain method, or the preparation of data, may keep hold of a model."""
    if trainer == "one-by-one" or plan.prepare is not None or type(plan.method) is not LocalMethod:
        return build_part
    return _Place().build


def _train(tasks: Sequence[LocalTask], trainer: Trainer) -> Iterator[Trained | Exception]:
    """In the order of tasks."""
    if trainer == "batched":
        plain = [t for t in tasks if _plain(t)]
        side_by_side = iter(batched.train_many(plain))
        yield from (next(side_by_side) if _plain(t) else _one(t) for t in tasks)
    else:
        yield from (_one(t, trainer) for t in tasks)


def _one(task: LocalTask, trainer: Trainer = "one-by-one") -> Trained | Exception:
    try:
        if trainer == "compiled":
            task = replace(task, fit=compiled.train)
        return task.plan.method.train(task)
    except Exception as why:
        return why


def _plain(task: LocalTask) -> bool:
    """Whether the method trains as all do that say nothing else."""
    return type(task.plan.method).train is LocalMethod.train
