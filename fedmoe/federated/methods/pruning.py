"""Static pruning by frequency: everybody holds the experts that all data together use most.

The federated form of pruning a trained MoE by how often its experts are activated: one choice for
all, made once. It tells how much of FedMoE's gain comes from choosing for each client, and how
much from choosing at all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmoe.federated.fedmoe import FedMoE, FedMoEState, frequency
from fedmoe.types import ActivationProfile


@dataclass(frozen=True)
class FrequencyPruning(FedMoE):
    """FedMoE with one ranking of experts for all: the mean of the shares that clients scouted.

    A client holds as many of the first as its memory takes, so small parts lie within large ones,
    and keeps them to the end. One that scouts after the first round is given the ranking of all
    that have scouted by then.
    """

    measure: Callable[[ActivationProfile], Tensor] = frequency
    patience: int | None = None

    def _wanted(self, state: FedMoEState, known: Sequence[int]) -> Tensor:
        p_KLE = torch.stack([state.p[k] for k in known])
        return p_KLE.mean(0, keepdim=True).expand_as(p_KLE)
