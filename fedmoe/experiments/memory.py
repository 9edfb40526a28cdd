"""How much memory a client needs for a sub-MoE: measured over one training step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from fedmoe.data.examples import Examples
from fedmoe.device import peak_memory
from fedmoe.experiments.experiment import Experiment
from fedmoe.federated.local import LocalTask, Trained, only_chosen
from fedmoe.population import together
from fedmoe.rng import torch_generator
from fedmoe.state import build_part, layer_sizes, load_state, split_state
from fedmoe.types import (
    ActivationProfile,
    AskingStrategy,
    Assignment,
    ClientInfo,
    ClientUpdate,
    MoEState,
    State,
    SubMoE,
)


@dataclass(frozen=True, eq=False)
class Step:
    """One client's training on a few batches, as its plan's method does it."""

    peak_bytes: int
    trained: Trained


def peak_bytes(
    experiment: Experiment, sub_moe: SubMoE, device: torch.device | str = "cpu"
) -> int:
    """Peak of parameters, gradients, optimizer state and activations while one batch trains.

    What the plan's method takes beside them is included: a second model, and what it was sent and
    has stored, such as the controls of SCAFFOLD. The client's own data set is not counted: it has
    that whatever it trains.
    """
    extra = extra_for(experiment, sub_moe)
    return measured_step(experiment, sub_moe, experiment.plan.batch_size, extra, device).peak_bytes


def measured_step(
    experiment: Experiment,
    sub_moe: SubMoE,
    num_examples: int,
    extra: State,
    device: torch.device | str = "cpu",
) -> Step:
    """The first client's training on its first examples, as in a round that is not its first.

    Args:
        extra: what the method's server side sends beside the model.
    """
    device, method = torch.device(device), experiment.plan.method

    def step(kept: State) -> Trained:
        task = task_of(experiment, part, examples, extra, kept, device)
        method.begin(task)
        return method.train(task)

    part = split_state(experiment.factory()).only(sub_moe)
    examples = first_examples(experiment, num_examples)
    kept = step({}).kept if method.keeps else {}
    ends: list[Trained] = []
    peak = peak_memory(lambda: ends.append(step(kept)), device)
    return Step(peak, ends[0])


def first_examples(experiment: Experiment, count: int) -> Examples:
    """The first of the first client's training examples, prepared as its plan says."""
    first, prepare = experiment.clients[0].id, experiment.plan.prepare
    data = experiment.data.load(first)
    if prepare is not None:
        data = prepare(first, experiment.factory(), data)
    x, y = data.train
    return Examples(x[:count], y[:count])


def task_of(
    experiment: Experiment,
    part: MoEState,
    examples: Examples,
    extra: State,
    kept: State,
    device: torch.device,
) -> LocalTask:
    """What a client is given in a round, in memory of its own: it has read what it `kept` and
    received `part` and `extra`.
    """
    model = build_part(experiment.factory, frozenset(part.experts))
    load_state(model, part)
    model.to(device)
    own, sent = ({n: t.clone() for n, t in s.items()} for s in (kept, extra))
    first, plan = experiment.clients[0].id, experiment.plan
    # Its validation part is none: who chooses by it measures, and does not train.
    return LocalTask(first, model, examples, plan, torch_generator(0), device, own, sent)


def extra_for(experiment: Experiment, sub_moe: SubMoE) -> State:
    """What the strategy sends beside the model to a client of as many experts in each layer."""
    for assignment in first_assignments(experiment, split_state(experiment.factory())).values():
        if _counts(assignment.sub_moe) == _counts(sub_moe):
            return assignment.extra
    return {}


def first_assignments(experiment: Experiment, model: MoEState) -> Mapping[int, Assignment]:
    """What every client that is listed is assigned at the start; where it is asked first, it wants
    no expert more than another. Nothing where experts are chosen on the way.
    """
    strategy, clients = experiment.strategy, experiment.listed
    state = strategy.init(model, together(experiment.clients, experiment.unseen))
    if strategy.phase(state) != "train":
        return {}
    if hasattr(strategy, "ask"):
        state = _heard(cast(AskingStrategy[Any], strategy), state, clients, experiment)
    return strategy.assign(state, clients)


def _heard(
    strategy: AskingStrategy[Any],
    state: Any,
    clients: Sequence[ClientInfo],
    experiment: Experiment,
) -> Any:
    with torch.device("meta"):
        sizes = layer_sizes(experiment.factory())
    nothing = ActivationProfile.empty(len(sizes), max(sizes, default=0))
    score_LE = nothing.score_LE.clone()
    for layer, size in enumerate(sizes):
        score_LE[layer, :size] = 1
    alike = ActivationProfile(nothing.count_LE, nothing.weight_LE, score_LE, nothing.token_L)
    answers = [
        ClientUpdate(
            client,
            1,
            MoEState({}, {}),
            alike if asked.choose is None else only_chosen(alike, asked.choose),
            {},
        )
        for client, asked in strategy.ask(state, clients).items()
    ]
    return strategy.heard(state, answers)


def _counts(sub_moe: SubMoE) -> dict[int, int]:
    counts: dict[int, int] = {}
    for e in sub_moe:
        counts[e.layer] = counts.get(e.layer, 0) + 1
    return counts
