"""Top-k gate: each token goes to the k experts that it scores highest.

Shazeer et al. 2017, "Outrageously Large Neural Networks", arXiv:1701.06538, eq. 3-5, without the
noise term. `gate_mass` says what becomes of the probability of experts that a token does not run:
"renormalise" gives it to the k chosen, as Mixtral does (arXiv:2401.04088); "full" drops it, as
Switch does (arXiv:2101.03961) and OLMoE (arXiv:2409.02060). With "full", a sub-MoE that knows the
gate rows of the experts it lacks weighs the others exactly as the whole model does. "sum" is
"renormalise" times k, so that outputs are added up and not averaged: the scaling factor of
DeepSeek-AI 2024, arXiv:2405.04434, set to k. A sub-MoE of k experts is then one layer as wide as
all of them, and learns as fast as that. With k=1, "renormalise" and "sum" make every weight 1, and
then no loss on the output teaches the gate.

Shape suffixes: T tokens, D width, E experts, K chosen.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from fedmoe.native.top_k import available, top_k_softmax
from fedmoe.types import Routing

MAX_K_WITHOUT_SORT = 4  # a pass for each of the k costs less than a sort (16 and 64 experts)

GateMass = Literal["renormalise", "full", "sum"]


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
        if gate_mass not in ("renormalise", "full", "sum"):
            raise ValueError(f'gate_mass must be "renormalise", "full" or "sum", got {gate_mass!r}')
        self.dim, self.num_experts, self.k, self.gate_mass = dim, num_experts, k, gate_mass
        self.proj = nn.Linear(dim, num_experts, bias=False)
        known_E = torch.ones(num_experts, dtype=torch.bool)
        self.register_buffer("known_E", known_E, persistent=False)

    def forward(self, x_TD: Tensor, present_E: Tensor) -> Routing:
        """Weights are 0 but for each token's k highest present experts, or all if k exceeds them.

        Rows of `score_TE` sum to 1: over all known experts, present or not, with "full", and else
        over the present ones. Rows of `weight_TE` sum to 1 with "renormalise", to the score of the
        chosen with "full", and to their number with "sum". Without any present expert all weights
        are 0.
        """
        # Half precision would make ties, and so accidents, of close scores.
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        with torch.autocast(x_TD.device.type, enabled=False):
            all_TE = nn.functional.linear(x_TD.to(dtype), self.proj.weight.to(dtype))
            choosable_E = present_E & self.known_E
            num_choosable = int(choosable_E.sum())
            if num_choosable == self.num_experts:
                logit_TE = all_TE
            else:
                logit_TE = all_TE.masked_fill(~choosable_E, -torch.inf)
            if self.gate_mass == "full":
                score_TE = masked_softmax(all_TE, self.known_E)
                weight_TE = keep_top_k(score_TE * choosable_E, self.k)
            elif num_choosable == 0:
                score_TE = weight_TE = masked_softmax(all_TE, choosable_E)
            else:
                score_TE = logit_TE.softmax(-1)
                k = min(self.k, num_choosable)
                weight_TE = top_k_weights(logit_TE, choosable_E, k)
                if (total := self.total_weight(num_choosable)) != 1.0:
                    weight_TE = weight_TE * total
        return Routing(weight_TE, score_TE, logit_TE)

    def total_weight(self, num_choosable: int) -> float:
        """What a token's weights sum to where they are not scores, of so many present experts."""
        return float(min(self.k, num_choosable)) if self.gate_mass == "sum" else 1.0


def top_k_weights(logit_TE: Tensor, choosable_E: Tensor, k: int) -> Tensor:
    """Softmax over each row's k highest choosable logits, 0 elsewhere: the loss reaches just these.

    The others' logits must be -inf.
    """
    plain = type(logit_TE) is Tensor and logit_TE.dtype == torch.float32
    if plain and logit_TE.device.type == "cpu" and available():
        return top_k_softmax(logit_TE, choosable_E, k)
    best_TK = top_k_indices(logit_TE.detach(), k)
    weight_TK = logit_TE.gather(-1, best_TK).softmax(-1)
    return torch.zeros_like(logit_TE).scatter(-1, best_TK, weight_TK)


def masked_softmax(logit_TE: Tensor, mask_E: Tensor) -> Tensor:
    """Softmax over the experts in `mask_E`; 0 for the others, and everywhere if there are none."""
    if not mask_E.any():
        # Softmax would make NaN of it. These zeros still let a gradient through: zeros.
        return logit_TE.masked_fill(~mask_E, 0.0)
    return logit_TE.masked_fill(~mask_E, -torch.inf).softmax(-1)


def keep_top_k(score_TE: Tensor, k: int) -> Tensor:
    """Zero all but each row's k highest scores. Of equal scores, lower expert numbers win."""
    num_experts = score_TE.shape[-1]
    if k >= num_experts:
        return score_TE
    best_TK = top_k_indices(score_TE.detach(), k)
    return torch.zeros_like(score_TE).scatter(-1, best_TK, score_TE.gather(-1, best_TK))


def top_k_indices(score_TE: Tensor, k: int) -> Tensor:
    """The k highest of each row, highest first; of equal scores, lower expert numbers win.

    Rows must have at least k scores above -inf.
    """
    # torch.topk leaves open which of equal scores it takes; a maximum and a stable sort do not.
    if k > MAX_K_WITHOUT_SORT:
        return score_TE.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    best = [score_TE.max(-1, keepdim=True).indices]
    rest_TE = score_TE.clone() if k > 1 else score_TE
    while len(best) < k:
        rest_TE.scatter_(-1, best[-1], -torch.inf)
        best.append(rest_TE.max(-1, keepdim=True).indices)
    return torch.cat(best, dim=-1)


def rows_to_one(weight_TE: Tensor) -> Tensor:
    """Rescale each row to sum to 1; a row of zeros stays."""
    return weight_TE / weight_TE.sum(-1, keepdim=True).clamp_min(torch.finfo(weight_TE.dtype).tiny)
