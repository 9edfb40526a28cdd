"""Linear discriminants: what sums over examples say of classes, in closed form.

Fisher 1936, "The use of multiple measurements in taxonomic problems". Classes are taken for normal
distributions with means of their own and one covariance, so the log-odds of an example are linear
in it. All that is needed are sums over examples; so what clients know is added up, nobody takes a
step of training, and clients who have few labels cannot pull the result towards these. Federated,
with ridge regression in place of the likelihood: Fanì, Camoriano, Caputo, Ciccone 2024,
"Accelerating Heterogeneous Federated Learning with Closed-form Classifiers", arXiv:2406.01116.

Shape suffixes: N examples, F features, C classes, E experts.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

SHRINK = 0.01
# The names of what the anchor of an expert tells.
COUNT, SUM, SECOND = "count_CE", "sum_CF", "second_FF"
UNKNOWN = -1e4  # the logit of a class that no anchor has: finite, as the wire wants it


class Moments(NamedTuple):
    """Sums over examples. Those of two sets of examples add up; all may be scaled alike."""

    count_C: Tensor
    sum_CF: Tensor
    second_FF: Tensor  # of outer products, over all classes


def moments_of(feature_NF: Tensor, y_N: Tensor, num_classes: int) -> Moments:
    """The moments of these examples, in the features' dtype."""
    count_C = y_N.bincount(minlength=num_classes).to(feature_NF.dtype)
    sum_CF = feature_NF.new_zeros(num_classes, feature_NF.shape[1]).index_add(0, y_N, feature_NF)
    return Moments(count_C, sum_CF, feature_NF.T @ feature_NF)


def discriminant(moments: Moments, shrink: float = SHRINK) -> tuple[Tensor, Tensor]:
    """Weights (C, F) and biases (C), float64, of the classes' logits, all classes alike likely.

    Whatever the moments are, as long as they are finite, so is the result: counts below 0 count as
    0, and no direction's variance is less than `shrink` times the mean one.

    Args:
        shrink: added to the covariance's diagonal, in shares of its mean.

    Returns:
        A class without examples has weights 0 and bias -inf.
    """
    count_C, sum_CF, second_FF = (t.double() for t in moments)
    known_C = count_C > 0
    total = count_C[known_C].sum()
    weight_CF = torch.zeros_like(sum_CF)
    bias_C = torch.full_like(count_C, -torch.inf)
    if not known_C.any():
        return weight_CF, bias_C
    mean_CF = sum_CF[known_C] / count_C[known_C, None]
    between_FF = (mean_CF * count_C[known_C, None]).T @ mean_CF
    within_FF = (second_FF - between_FF) / total
    # By eigenvalues, so that sums that no examples can have make no failure.
    value_F, vector_FF = torch.linalg.eigh((within_FF + within_FF.T) / 2)
    value_F = value_F.clamp_min(0)
    least = shrink * value_F.mean()
    value_F = (value_F + least).clamp_min(torch.finfo(torch.float32).eps)
    weight_CF[known_C] = (mean_CF @ vector_FF / value_F) @ vector_FF.T
    bias_C[known_C] = -(weight_CF[known_C] * mean_CF).sum(1) / 2
    return weight_CF, bias_C


def told(
    feature_NF: Tensor, y_N: Tensor, num_classes: int, expert: int, num_experts: int
) -> dict[str, Tensor]:
    """What the anchor of this expert tells: its sums over its number of examples, float32."""
    moments = moments_of(feature_NF.float(), y_N, num_classes)
    count_C, sum_CF, second_FF = (t / len(y_N) for t in moments)
    count_CE = count_C.new_zeros(num_classes, num_experts)
    count_CE[:, expert] = count_C
    return {COUNT: count_CE, SUM: sum_CF, SECOND: second_FF}


def nothing_told(num_features: int, num_classes: int, num_experts: int) -> dict[str, Tensor]:
    """The sums over no examples, in the shapes of `told`."""
    return {
        COUNT: torch.zeros(num_classes, num_experts),
        SUM: torch.zeros(num_classes, num_features),
        SECOND: torch.zeros(num_features, num_features),
    }


def fitted(sums: Mapping[str, Tensor], shrink: float) -> dict[str, Tensor]:
    """The parameters of a `gates.discriminant.DiscriminantGate`, float32, from sums over anchors.

    Classes without examples get no score, and so no expert a part of it.
    """
    count_CE = sums[COUNT].clamp_min(0)
    count_C = count_CE.sum(1)
    weight_CF, bias_C = discriminant(Moments(count_C, sums[SUM], sums[SECOND]), shrink)
    return {
        "proj.weight": weight_CF.float(),
        "proj.bias": bias_C.clamp_min(UNKNOWN).float(),
        "share_CE": count_CE / count_C.clamp_min(1e-9)[:, None],
    }
