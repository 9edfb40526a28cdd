"""What gates have in common that rank all experts, held or not, by an encoder's features.

Such a gate has no row for each expert: it travels as one piece. The gates themselves are in
`fedmoe.nn.gates`.

Shape suffixes: T tokens, D numbers of a token, F features, E experts.
"""

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor, nn

from fedmoe.types import Routing

Use = Literal["best", "weighted"]
GateMass = Literal["renormalise", "full"]


class Ranking(nn.Module, ABC):
    """What gates have in common that rank all experts by the last `width` numbers of a token."""

    row_names: tuple[str, ...] = ()

    def __init__(self, width: int, num_experts: int, use: Use, gate_mass: GateMass) -> None:
        """
        Args:
            use: outside training, each token runs its best present expert alone, or all present
                ones by their scores. In training always the latter.
            gate_mass: "renormalise" gives the score of absent experts to the present ones, "full"
                drops it.
        """
        super().__init__()
        if use not in ("best", "weighted"):
            raise ValueError(f'use must be "best" or "weighted", got {use!r}')
        if gate_mass not in ("renormalise", "full"):
            raise ValueError(f'gate_mass must be "renormalise" or "full", got {gate_mass!r}')
        self.width, self.num_experts = width, num_experts
        self.use, self.gate_mass = use, gate_mass

    @abstractmethod
    def rank(self, feature_TF: Tensor) -> Tensor:
        """Logits (T, E) of all experts, of features that are not in half precision."""

    def forward(self, x_TD: Tensor, present_E: Tensor) -> Routing:
        """Rows of `score_TE` sum to 1 over all experts, whoever is present: so a scout that holds
        none still learns which it wants. Rows of `weight_TE` sum to 1 over the present experts, or
        with "full" to their scores; the best one alone, outside training, weighs 1 with either.

        Raises:
            ValueError: the tokens are narrower than `width`.
        """
        if x_TD.shape[-1] < self.width:
            raise ValueError(f"x must have at least {self.width} features, got {x_TD.shape[-1]}")
        # Half precision would make ties, and so accidents, of close scores.
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        with torch.autocast(x_TD.device.type, enabled=False):
            all_TE = self.rank(x_TD[:, -self.width :].to(dtype))
            score_TE = all_TE.softmax(-1)
            logit_TE = all_TE.masked_fill(~present_E, -torch.inf)
            if not present_E.any():
                weight_TE = score_TE * present_E
            elif not self.training and self.use == "best":
                best_T1 = logit_TE.argmax(-1, keepdim=True)
                weight_TE = torch.zeros_like(score_TE).scatter(-1, best_T1, 1.0)
            elif self.gate_mass == "full":
                weight_TE = score_TE * present_E
            else:
                weight_TE = logit_TE.softmax(-1)
        return Routing(weight_TE, score_TE, logit_TE)


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer in the dtype of `x`."""
    return nn.functional.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))
