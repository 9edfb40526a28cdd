"""Ditto: a personal model of one's own, held near the global one by a proximal term.

Li, Hu, Beirami, Smith 2021, "Ditto: Fair and Robust Federated Learning Through Personalization",
arXiv:2012.04221. A client trains the global model as in FedAvg, which goes up, and its own model
on F(v) + lambda / 2 * |v - w|^2, where w is the global model as it was received. Ours begins the
own model as the first one received, and both see the same batches in the same order, so that
lambda = 0 is training alone. The paper's robust aggregations are left out.
"""

import math
from dataclasses import dataclass, replace

from fedmoe.federated.local import LocalMethod, LocalTask, Phase, Trained
from fedmoe.federated.methods.kept import kept_with, own_model, values_of


@dataclass(frozen=True)
class Ditto(LocalMethod):
    """The local method; the strategy is FedAvg.

    Attributes:
        pull: the paper's lambda, 0 or more.
        epochs: of the personal model, in one phase over all parameters; None: as the plan has it.
    """

    pull: float = 0.1
    epochs: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.pull) and self.pull >= 0):
            raise ValueError(f"pull must be a number of 0 or more, got {self.pull}")
        if self.epochs is not None and self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, or None, got {self.epochs}")

    @property
    def keeps(self) -> bool:
        return True

    @property
    def fits(self) -> bool:
        return True

    def train(self, task: LocalTask) -> Trained:
        own, received = own_model(task), values_of(task.model)
        same_batches = task.generator.clone_state()
        profile, loss = task.train()

        plan = replace(task.plan, proximal=self.pull)
        if self.epochs is not None:
            plan = replace(plan, phases=(Phase(epochs=self.epochs),))
        task.train(own, plan, same_batches, towards=received)
        return Trained(profile, loss, used=own, kept=kept_with(task, own))
