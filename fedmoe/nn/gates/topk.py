"""Top-k gate: each token goes to the k experts that it scores highest.

Shazeer et al. 2017, "Outrageously Large Neural Networks", arXiv:1701.06538, eq. 3-5, without the
noise term. `gate_mass` says what becomes of the probability of experts that a token does not run:
"renormalise" gives it to the k chosen, as Mixtral does (arXiv:2401.04088); "full" drops it, as
Switch does (arXiv:2101.03961) and OLMoE (arXiv:2409.02060). With "full", a sub-MoE that knows the
gate rows of the experts it lacks weighs the others exactly as the whole model does.

Shape suffixes: T tokens, D width, E experts, K chosen.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from fedmoe.types import Routing

GateMass = Literal["renormalise", "full"]


class TopKGate(nn.Module):
    """Softmax over linear scores, cut to each token's k highest among the present experts."""

    row_names: tuple[str, ...] = ("proj.weight",)  # parameters whose dimension 0 is experts
    known_E: Tensor  # rows whose values were really loaded; the others are never used

    def __init__(
        self, dim: int, num_experts: int, k: int, *, gate_mass: GateMass = "renormalise"
    ) -> None:
        super().__init__()
        if not 1 <= k <= num_experts:
            raise ValueError(f"k must be between 1 and the {num_experts} experts, got {k}")
        if gate_mass not in ("renormalise", "full"):
            raise ValueError(f'gate_mass must be "renormalise" or "full", got {gate_mass!r}')
        self.dim, self.num_experts, self.k, self.gate_mass = dim, num_experts, k, gate_mass
        self.proj = nn.Linear(dim, num_experts, bias=False)
        known_E = torch.ones(num_experts, dtype=torch.bool)
        self.register_buffer("known_E", known_E, persistent=False)

    def forward(self, x_TD: Tensor, present_E: Tensor) -> Routing:
        """Weights are 0 but for each token's k highest present experts, or all if k exceeds them.

        Rows of `score_TE` sum to 1: over the present experts with "renormalise", and with "full"
        over all known ones, present or not. Rows of `weight_TE` sum to 1 with "renormalise" and
        to the score of the chosen with "full". Without any present expert all weights are 0.
        """
        # Half precision would make ties, and so accidents, of close scores.
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        with torch.autocast(x_TD.device.type, enabled=False):
            logit_TE = nn.functional.linear(x_TD.to(dtype), self.proj.weight.to(dtype))
            choosable_E = present_E & self.known_E
            in_softmax_E = choosable_E if self.gate_mass == "renormalise" else self.known_E
            score_TE = masked_softmax(logit_TE, in_softmax_E)
            weight_TE = keep_top_k(score_TE * choosable_E, self.k)
            if self.gate_mass == "renormalise":
                weight_TE = rows_to_one(weight_TE)
        return Routing(weight_TE, score_TE, logit_TE.masked_fill(~choosable_E, -torch.inf))


def masked_softmax(logit_TE: Tensor, mask_E: Tensor) -> Tensor:
    """Softmax over the experts in `mask_E`; 0 for the others, and everywhere if there are none."""
    # Not -inf, of which a row of nothing else would come out as NaN, and its gradient too.
    low = torch.finfo(logit_TE.dtype).min
    return logit_TE.masked_fill(~mask_E, low).softmax(-1) * mask_E


def keep_top_k(score_TE: Tensor, k: int) -> Tensor:
    """Zero all but each row's k highest scores. Of equal scores, lower expert numbers win."""
    num_experts = score_TE.shape[-1]
    if k >= num_experts:
        return score_TE
    # torch.topk leaves open which of equal scores it takes; a stable sort does not.
    order_TE = score_TE.detach().sort(dim=-1, descending=True, stable=True).indices
    kept_TE = torch.zeros_like(score_TE, dtype=torch.bool).scatter_(-1, order_TE[..., :k], True)
    return score_TE * kept_TE


def rows_to_one(weight_TE: Tensor) -> Tensor:
    """Rescale each row to sum to 1; a row of zeros stays."""
    return weight_TE / weight_TE.sum(-1, keepdim=True).clamp_min(torch.finfo(weight_TE.dtype).tiny)
