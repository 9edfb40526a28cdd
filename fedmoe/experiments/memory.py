"""How much memory a client needs for a sub-MoE: measured over one training step."""

import torch

from fedmoe.data.examples import Examples
from fedmoe.device import peak_memory
from fedmoe.experiments.experiment import Experiment
from fedmoe.federated.local import LocalTask
from fedmoe.rng import torch_generator
from fedmoe.state import build_part, load_state, split_state
from fedmoe.types import SubMoE


def peak_bytes(
    experiment: Experiment, sub_moe: SubMoE, device: torch.device | str = "cpu"
) -> int:
    """Peak of parameters, gradients, optimizer state and activations while one batch trains,
    whatever the plan's method keeps beside them included.

    The client's own data set is not counted: it has that whatever it trains.
    """
    device = torch.device(device)
    first = experiment.clients[0].id
    plan, data = experiment.plan, experiment.data.load(first)
    full = experiment.factory()
    if plan.prepare is not None:
        data = plan.prepare(first, full, data)
    x, y = data.train
    batch = Examples(x[: plan.batch_size], y[: plan.batch_size])
    state = split_state(full).only(sub_moe)

    def step() -> None:
        model = build_part(experiment.factory, sub_moe)
        load_state(model, state)
        model.to(device)
        generator = torch_generator(0)
        task = LocalTask(first, model, batch, plan, generator, device, {}, {})
        plan.method.begin(task)
        plan.method.train(task)

    return peak_memory(step, device)
