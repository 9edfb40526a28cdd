"""Losses on a layer's routing: spread the tokens over the experts, keep the logits small.

Fedus, Zoph & Shazeer 2021, "Switch Transformers", arXiv:2101.03961, eq. 4-6 (balance), and Zoph
et al. 2022, "ST-MoE", arXiv:2202.08906, eq. 5 (z-loss). Ours differ in knowing absent experts, in
any number of experts per token, and in taking one layer's routing at a time: pooled over layers,
imbalances in different layers would cancel. Padding never reaches a gate, so neither these.

Shape suffixes: T tokens, E experts.
"""

import torch
from torch import Tensor

from fedmoe.types import Routing


def load_balance_loss(routing: Routing, present_E: Tensor | None = None) -> Tensor:
    """Number of experts times the sum, over experts, of share of activations times mean score.

    Only the experts in `present_E` count (default: those with a finite logit, else all). 1 at
    perfect balance, whatever k; up to their number if all tokens go to one. 0 without
    tokens. The gradient goes through the scores alone, since counts have none.
    """
    if present_E is None:
        present_E = _present(routing)
    chosen_E = ((routing.weight_TE != 0) & present_E).sum(0)
    score_TE = routing.score_TE * present_E
    tiny = torch.finfo(score_TE.dtype).tiny
    # A gate's scores may sum to less than 1 over present experts; balance is among these alone.
    score_TE = score_TE / score_TE.sum(-1, keepdim=True).clamp_min(tiny)
    share_E = chosen_E / chosen_E.sum().clamp_min(1)
    mean_score_E = score_TE.sum(0) / max(len(score_TE), 1)
    return present_E.sum() * (share_E * mean_score_E).sum()


def z_loss(routing: Routing) -> Tensor:
    """Mean over tokens of the squared logsumexp of the present experts' logits. 0 without tokens.

    Raises:
        ValueError: this gate has no logits.
    """
    logit_TE = routing.logit_TE
    if logit_TE is None:
        raise ValueError("routing.logit_TE must not be None: the z-loss needs a gate with logits")
    any_T = (logit_TE > -torch.inf).any(-1)
    # A row of -inf alone would bring NaN gradients, even when left out afterwards.
    log_sum_T = logit_TE.masked_fill(~any_T[:, None], 0.0).logsumexp(-1) * any_T
    return log_sum_T.square().sum() / max(len(logit_TE), 1)


def _present(routing: Routing) -> Tensor:
    if routing.logit_TE is None:
        return torch.ones_like(routing.score_TE[0], dtype=torch.bool)
    return (routing.logit_TE > -torch.inf).any(0)
