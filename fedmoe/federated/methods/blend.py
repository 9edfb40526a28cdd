"""Blend: begin each round between what arrived and what one had, as one's own validation says.

A client whose data are like many others' does best with the model that it receives; one whose data
are like nobody's, with the model that it trained itself. Which of the two it is, its own validation
part can tell before it trains, at the cost of a few forward passes and no byte. The idea of mixing
the two on the client is FedALA's (Zhang et al. 2023, "FedALA: Adaptive Local Aggregation for
Personalized Federated Learning", arXiv:2212.01197), which learns a weight for every parameter of
the upper layers on the training data; ours chooses a weight for the shared part and one for the
experts (with their gate rows) from a short list, on the validation data.

What goes up is the model as trained from there, so the strategy is any: FedMoE, FedAvg.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fedmoe.data.examples import Examples
from fedmoe.device import autocast
from fedmoe.federated.local import (
    EVALUATION_BATCH,
    LocalMethod,
    LocalTask,
    Trained,
)
from fedmoe.federated.methods.kept import kept_with, own_model
from fedmoe.state import named_by_role

Share = tuple[float, float]  # of one's own model, 0 to 1: in the shared part, in the experts


@dataclass(frozen=True)
class Blend(LocalMethod):
    """The local method.

    After training, the client goes on with the blend or with the trained model, whichever is
    the better on its validation part; that one is kept, and the next round's blends are made of
    it. Without validation examples it begins with what arrived and keeps what it trained. A
    validation part of a few examples chooses badly: see simulations/LOG.md.

    Attributes:
        shares: the blends to choose from; of equally good ones the first wins.
    """

    shares: Sequence[Share] = ((0.0, 0.0), (0.5, 0.5), (0.0, 1.0), (1.0, 1.0))

    def __post_init__(self) -> None:
        if not self.shares:
            raise ValueError("shares must name at least one blend, got none")
        for pair in self.shares:
            if len(pair) != 2 or not all(0 <= share <= 1 for share in pair):
                raise ValueError(f"shares must be pairs of numbers from 0 to 1, got {pair}")

    @property
    def keeps(self) -> bool:
        return True

    @property
    def fits(self) -> bool:
        return True

    def train(self, task: LocalTask) -> Trained:
        judge = task.validation if task.validation and len(task.validation.y) else None
        if task.kept and judge is not None:
            self._begin(task, judge)
        start = copy.deepcopy(task.model) if judge is not None else None
        profile, loss = task.train()
        used = task.model
        if start is not None and judge is not None:
            before, after = (faults(m, judge, task.device) for m in (start, task.model))
            used = start if before < after else task.model
        return Trained(profile, loss, used=used, kept=kept_with(task, used))

    def _begin(self, task: LocalTask, judge: Examples) -> None:
        """Put the best blend into the task's model."""
        received = {n: p.detach().clone() for n, p in named_by_role(task.model)}
        own = {n: p.detach() for n, p in named_by_role(own_model(task))}
        best, least = self.shares[0], (math.inf, math.inf)
        for share in self.shares:
            _blend(task.model, received, own, share)
            if (found := faults(task.model, judge, task.device)) < least:
                best, least = share, found
        _blend(task.model, received, own, best)


@torch.no_grad()
def _blend(
    model: nn.Module,
    received: dict[str, torch.Tensor],
    own: dict[str, torch.Tensor],
    share: Share,
) -> None:
    for name, p in named_by_role(model):
        within = name.startswith(("experts.", "gates."))
        p.copy_(torch.lerp(received[name], own[name], share[1] if within else share[0]))


@torch.no_grad()
def faults(
    model: nn.Module, examples: Examples, device: torch.device
) -> tuple[float, float]:
    """What to compare models by: the share of examples that are wrong, then the mean loss.

    Loss alone would punish a model that trained long on its own data for being too sure.
    """
    model.eval()
    total, wrong = 0.0, 0
    for x_B, y_B in zip(
        torch.split(examples.x, EVALUATION_BATCH),
        torch.split(examples.y, EVALUATION_BATCH),
        strict=True,
    ):
        with autocast(device):
            logit_BC = model(x_B.to(device))
        y_B = y_B.to(device)
        total += float(nn.functional.cross_entropy(logit_BC.float(), y_B, reduction="sum"))
        wrong += int((logit_BC.argmax(-1) != y_B).sum())
    return wrong / len(examples.y), total / len(examples.y)
