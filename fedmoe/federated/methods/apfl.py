"""APFL: each client uses its own mixture of a local model and the global one.

Deng, Kamani, Mahdavi 2020, "Adaptive Personalized Federated Learning", arXiv:2003.13461. The
client trains the global model w as in FedAvg, which goes up, and a model v of its own so that the
mixture alpha * v + (1 - alpha) * w, of parameters and not of outputs, gets better. It uses the
mixture.

How ours differs: the paper takes a step of w and a step of v in turns, ours all steps of w first
and then, on the same batches, all of v beside the trained w. An adaptive alpha takes one step a
round, along the round's mean gradient, which counts from the next round on.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedmoe.federated.local import LocalMethod, LocalTask, Trained, train
from fedmoe.federated.methods.kept import kept_with, own_model

ALPHA = "alpha"  # under this name a client keeps its own


@dataclass(frozen=True)
class APFL(LocalMethod):
    """The local method; the strategy is FedAvg.

    Attributes:
        alpha: share of the local model in the mixture, 0 to 1; the first one, where adaptive.
        adaptive: each client learns its own alpha, at the plan's learning rate.
    """

    alpha: float = 0.5
    adaptive: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be between 0 and 1, got {self.alpha}")

    @property
    def keeps(self) -> bool:
        return True

    def train(self, task: LocalTask) -> Trained:
        own = own_model(task)
        kept_alpha = float(task.kept.get(ALPHA, torch.tensor(self.alpha)))
        same_batches = task.generator.clone_state()
        profile, loss = train(
            task.model, task.examples, task.plan, task.generator, task.device, task.client
        )
        alpha = torch.tensor(kept_alpha, device=task.device, requires_grad=self.adaptive)
        num_steps = 0

        def mixed(model: nn.Module, x: Tensor) -> Tensor:
            nonlocal num_steps
            num_steps += 1
            logit_BC: Tensor = functional_call(model, mixture(model, task.model, alpha), (x,))
            return logit_BC

        train(
            own, task.examples, task.plan, same_batches, task.device, task.client, forward=mixed
        )
        used = copy.deepcopy(own)
        with torch.no_grad():
            for name, value in mixture(own, task.model, alpha).items():
                used.get_parameter(name).copy_(value)
        if alpha.grad is not None:  # summed over the steps
            kept_alpha -= task.plan.lr * float(alpha.grad) / num_steps
        kept_alpha = min(1.0, max(0.0, kept_alpha))
        kept = kept_with(task, own) | {ALPHA: torch.tensor(kept_alpha, dtype=torch.float64)}
        return Trained(profile, loss, used=used, kept=kept)


def mixture(own: nn.Module, other: nn.Module, alpha: Tensor | float) -> dict[str, Tensor]:
    """alpha * own + (1 - alpha) * other, by the parameters' names in the module.

    Gradients reach `own` and `alpha`, and not `other`.
    """
    others = dict(other.named_parameters())
    return {
        n: alpha * p + (1 - alpha) * others[n].detach() for n, p in own.named_parameters()
    }
