"""A classifier in two parts: a stem that makes features, and a head of experts over classes.

Shape suffixes: N examples, O classes.
"""

from collections.abc import Callable

from torch import Tensor, nn

from fedmoe.nn.experts.ffn import FFN
from fedmoe.nn.gates.topk import GateMass, TopKGate
from fedmoe.nn.init import seeded
from fedmoe.nn.moe import MoE


class StemAndHead(nn.Module):
    """A body that makes features, and a head that classifies them."""

    def __init__(self, stem: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.stem = stem
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        """(N, ...) -> (N, O)."""
        logit_NO: Tensor = self.head(self.stem(x))
        return logit_NO


def dense_classifier(
    stem: Callable[[], nn.Module], dim: int, hidden: int, num_classes: int, seed: int = 0
) -> StemAndHead:
    """A stem to features of width `dim`, and one hidden layer in place of experts."""
    return seeded(lambda: StemAndHead(stem(), FFN(dim, hidden, num_classes)), seed)


def moe_head(
    dim: int, hidden: int, num_classes: int, num_experts: int, k: int, gate_mass: GateMass
) -> MoE:
    """A MoE layer from features to logits: each expert has its own slice of the classifier."""
    experts = {e: FFN(dim, hidden, num_classes) for e in range(num_experts)}
    gate = TopKGate(dim, num_experts, k, gate_mass=gate_mass)
    return MoE(gate, experts, num_experts)
