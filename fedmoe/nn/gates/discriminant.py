"""A gate that is computed from what anchors tell of their features, and never trained.

FedJETs (Dun et al. 2023, arXiv:2306.08586) trains its gate in federated rounds in which each anchor
teaches it that everything is that anchor's own: label skew at its worst, and a weak encoder leaves
little to stand against it. The gate here is the linear discriminant of the anchors' labels on the
frozen encoder's features (`nn.discriminant.fitted`), which needs sums over the anchors' examples
alone. Ours, not the paper's; `fedmoe.federated.fedjets.Fitted` is the server's side.

Shape suffixes: T tokens, F features, C classes, E experts.
"""

import torch
from torch import Tensor, nn

from fedmoe.nn.ranking import GateMass, Ranking, Use, linear


class DiscriminantGate(Ranking):
    """An expert's score: the likelihood of each class, times the expert's share of that class.

    `proj` gives the classes' logits, `share_CE` says what part of the anchors' examples of a class
    is with the anchor of each expert. Until it is computed the gate is as it is drawn: class c is
    expert c's, modulo the number of experts.
    """

    def __init__(
        self,
        width: int,
        num_classes: int,
        num_experts: int,
        *,
        use: Use = "best",
        gate_mass: GateMass = "renormalise",
    ) -> None:
        """`use` and `gate_mass` are those of `Ranking`."""
        super().__init__(width, num_experts, use, gate_mass)
        self.proj = nn.Linear(width, num_classes)
        own_C = torch.arange(num_classes) % num_experts
        self.share_CE = nn.Parameter(nn.functional.one_hot(own_C, num_experts).float())

    def rank(self, feature_TF: Tensor) -> Tensor:
        class_TC = linear(self.proj, feature_TF).softmax(-1)
        score_TE = class_TC @ self.share_CE.to(class_TC.dtype)
        return score_TE.clamp_min(torch.finfo(torch.float32).tiny).log()
