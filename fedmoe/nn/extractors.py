"""Two feature extractors, one private and large, one shared and small, and a gate between them.

pFedMoE: Yi et al. 2024, arXiv:2402.01350. Every example passes both extractors, the gate weighs
their features for that example, and a header classifies the mixture. Only the small extractor is
averaged over clients; which names that leaves at home is
`federated.methods.personal.is_not_shared_extractor`. The paper's private extractors differ from
client to client in size, ours do not, and its gate has two layers and a normalisation where ours
is one linear map.

Shape suffixes: N examples, D numbers of a flattened input, F features, O classes.
"""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from fedmoe.nn.gates.topk import TopKGate
from fedmoe.nn.init import seeded
from fedmoe.nn.moe import MoE
from fedmoe.nn.sensors import MOTION_WIDTH, SignalStem
from fedmoe.nn.vision import CNN_WIDTH, ConvStem

PRIVATE, SHARED = 0, 1  # their places as experts


class TwoExtractors(nn.Module):
    """The gate and the extractors are a MoE layer of two experts that always both run."""

    def __init__(
        self,
        private: nn.Module,
        shared: nn.Module,
        input_shape: Sequence[int],
        num_features: int,
        num_classes: int,
    ) -> None:
        """Both extractors are from (N, *input_shape) to (N, `num_features`)."""
        super().__init__()
        shape = tuple(input_shape)
        width = math.prod(shape)
        experts = {
            PRIVATE: nn.Sequential(nn.Unflatten(1, shape), private),
            SHARED: nn.Sequential(nn.Unflatten(1, shape), shared),
        }
        self.mixture = MoE(TopKGate(width, 2, k=2), experts, 2, num_features)
        self.header = nn.Linear(num_features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, *input_shape) float -> (N, O)."""
        feature_NF: Tensor = self.mixture(x.flatten(1))
        logit_NO: Tensor = self.header(feature_NF)
        return logit_NO


def fashion_extractors(
    num_features: int = 128, num_classes: int = 10, seed: int = 0
) -> TwoExtractors:
    """The convolutions of `fashion_cnn`, and shared ones with a quarter of their channels."""

    def build() -> TwoExtractors:
        private = _features(ConvStem(), CNN_WIDTH, num_features)
        shared = _features(ConvStem((8, 16)), CNN_WIDTH // 4, num_features)
        return TwoExtractors(private, shared, (1, 28, 28), num_features, num_classes)

    return seeded(build, seed)


def motion_extractors(
    num_features: int = 64, num_classes: int = 6, seed: int = 0
) -> TwoExtractors:
    """The convolutions of `motion_cnn`, and shared ones with a quarter of their channels."""

    def build() -> TwoExtractors:
        private = _features(SignalStem(), MOTION_WIDTH, num_features)
        shared = _features(SignalStem((8, 16)), MOTION_WIDTH // 4, num_features)
        return TwoExtractors(private, shared, (6, 128), num_features, num_classes)

    return seeded(build, seed)


def vowel_extractors(
    features: int = 10, num_features: int = 32, num_classes: int = 11, seed: int = 0
) -> TwoExtractors:
    """A hidden layer of 64 before the features, and a shared extractor without one."""

    def build() -> TwoExtractors:
        hidden = nn.Sequential(nn.Linear(features, 64), nn.ReLU())
        private = _features(hidden, 64, num_features)
        shared = _features(nn.Identity(), features, num_features)
        return TwoExtractors(private, shared, (features,), num_features, num_classes)

    return seeded(build, seed)


def _features(stem: nn.Module, width: int, num_features: int) -> nn.Sequential:
    return nn.Sequential(stem, nn.Linear(width, num_features), nn.ReLU())
