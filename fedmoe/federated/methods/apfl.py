"""APFL: each client uses its own mixture of a local model and the global one.

Deng, Kamani, Mahdavi 2020, "Adaptive Personalized Federated Learning", arXiv:2003.13461. The
client trains the global model w as in FedAvg, which goes up, and a model v of its own so that the
mixture alpha * v + (1 - alpha) * w, of parameters and not of outputs, gets better. It uses the
mixture.

How ours differs: the paper takes a step of w and a step of v in turns, ours all steps of w first
and then, on the same batches, all of v beside the trained w. An adaptive alpha takes one step a
round, along the round's mean gradient, which counts from the next round on.

The local model is trained through the mixture b, with gradients alpha * g(b). Where it can, ours
trains b itself, as a model like any other: a step of v by -lr * alpha * g is one of b by
-lr * alpha^2 * g, v's gradient is as long as clip where b's is as long as clip / alpha, and
alpha's gradient is that of b times v - w = (b - w) / alpha.
"""

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedmoe.federated.local import LocalMethod, LocalPlan, LocalTask, Slope, Trained
from fedmoe.federated.methods.kept import kept_with, own_model, values_of
from fedmoe.state import everything, named_by_role, nothing

ALPHA = "alpha"  # under this name a client keeps its own
LEAST = 0.05  # of alpha, below which rounding of the mixture blurs the local model


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

    @property
    def fits(self) -> bool:
        return True

    def train(self, task: LocalTask) -> Trained:
        own = own_model(task)
        alpha = float(task.kept.get(ALPHA, torch.tensor(self.alpha)))
        same_batches = task.generator.clone_state()
        profile, loss = task.train()
        by = by_mixture if tells(task.plan, alpha, self.adaptive) else through_mixture
        used, slope = by(task, own, alpha, same_batches, self.adaptive)
        if self.adaptive:
            alpha -= task.plan.lr * slope
        alpha = min(1.0, max(0.0, alpha))
        kept = kept_with(task, own) | {ALPHA: torch.tensor(alpha, dtype=torch.float64)}
        return Trained(profile, loss, used=used, kept=kept)


def through_mixture(
    task: LocalTask, own: nn.Module, alpha: float, batches: torch.Generator, adaptive: bool
) -> tuple[nn.Module, float]:
    """Train `own` beside `task.model`, as it is defined.

    Returns:
        The mixture, and the mean over steps of alpha's gradient; 0 unless adaptive.
    """
    share = torch.tensor(alpha, device=task.device, requires_grad=adaptive)
    num_steps = 0

    def mixed(model: nn.Module, x: Tensor) -> Tensor:
        nonlocal num_steps
        num_steps += 1
        logit_BC: Tensor = functional_call(model, mixture(model, task.model, share), (x,))
        return logit_BC

    task.train(own, batches=batches, forward=mixed)
    used = _mixed(own, task.model, share)
    return used, 0.0 if share.grad is None else float(share.grad) / num_steps


def by_mixture(
    task: LocalTask, own: nn.Module, alpha: float, batches: torch.Generator, adaptive: bool
) -> tuple[nn.Module, float]:
    """As `through_mixture`, by training the mixture itself; only where `tells` says so."""
    plan, used = task.plan, _mixed(own, task.model, alpha)
    start, other = values_of(used), values_of(task.model)
    slope = Slope(other) if adaptive else None
    plan = replace(
        plan,
        lr=plan.lr * alpha**2,
        clip=None if plan.clip is None else plan.clip / alpha,
        proximal=plan.proximal / alpha**2,
    )
    task.train(used, plan, batches, slope)
    with torch.no_grad():
        for (name, v), b in zip(named_by_role(own), used.parameters(), strict=True):
            moved = (b - (1 - alpha) * other[name]) / alpha
            v.copy_(torch.where(b == start[name], v, moved))
        for mine, trained in zip(own.buffers(), used.buffers(), strict=True):
            mine.copy_(trained)
    steps = -(-len(task.examples.y) // plan.batch_size) * sum(p.epochs for p in plan.phases)
    return used, 0.0 if slope is None else slope.total / alpha / steps


def tells(plan: LocalPlan, alpha: float, adaptive: bool) -> bool:
    """Whether the training of the mixture tells that of the local model, and alpha's gradient."""
    if alpha < LEAST or plan.weight_decay:
        return False
    # Alpha's gradient is that of the loss alone, and goes through all parameters.
    whole = plan.frozen is nothing and all(p.trains is everything for p in plan.phases)
    return not adaptive or (whole and not plan.proximal)


@torch.no_grad()
def _mixed(own: nn.Module, other: nn.Module, alpha: Tensor | float) -> nn.Module:
    model = copy.deepcopy(own)
    for name, value in mixture(own, other, alpha).items():
        model.get_parameter(name).copy_(value)
    return model


def mixture(own: nn.Module, other: nn.Module, alpha: Tensor | float) -> dict[str, Tensor]:
    """alpha * own + (1 - alpha) * other, by the parameters' names in the module.

    Gradients reach `own` and `alpha`, and not `other`.
    """
    others = dict(other.named_parameters())
    return {
        n: alpha * p + (1 - alpha) * others[n].detach() for n, p in own.named_parameters()
    }
