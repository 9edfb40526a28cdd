"""How much memory a client needs for a sub-MoE: measured over one training step."""

import torch

from fedmoe.data.examples import Examples
from fedmoe.device import peak_memory
from fedmoe.experiments.experiment import Experiment
from fedmoe.federated.local import train
from fedmoe.rng import torch_generator
from fedmoe.state import build_part, load_state, split_state
from fedmoe.types import SubMoE


def peak_bytes(
    experiment: Experiment, sub_moe: SubMoE, device: torch.device | str = "cpu"
) -> int:
    """Peak of parameters, gradients, optimizer state and activations while one batch trains.

    The client's own data set is not counted: it has that whatever it trains.
    """
    device = torch.device(device)
    first = experiment.clients[0].id
    x, y = experiment.data.load(first).train
    batch = Examples(x[: experiment.plan.batch_size], y[: experiment.plan.batch_size])
    state = split_state(experiment.factory()).only(sub_moe)

    def step() -> None:
        model = build_part(experiment.factory, sub_moe)
        load_state(model, state)
        model.to(device)
        train(model, batch, experiment.plan, torch_generator(0), device, first)

    return peak_memory(step, device)
