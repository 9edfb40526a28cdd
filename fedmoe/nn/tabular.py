"""A small model with experts for rows of features, like the ten of Deterding's vowels."""

from torch import nn

from fedmoe.nn.classifier import StemAndHead, moe_head
from fedmoe.nn.gates.topk import GateMass
from fedmoe.nn.init import seeded


def vowel_mlp(
    features: int = 10,
    dim: int = 64,
    num_experts: int = 8,
    hidden: int = 32,
    k: int = 2,
    num_classes: int = 11,
    seed: int = 0,
    gate_mass: GateMass = "renormalise",
) -> StemAndHead:
    """A hidden layer of width `dim`, and experts of width `hidden` that classify.

    Takes (N, features); 20,760 parameters at the defaults.
    """

    def build() -> StemAndHead:
        stem = nn.Sequential(nn.Linear(features, dim), nn.ReLU())
        return StemAndHead(stem, moe_head(dim, hidden, num_classes, num_experts, k, gate_mass))

    return seeded(build, seed)
