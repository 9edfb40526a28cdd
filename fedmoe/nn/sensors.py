"""A small model with experts for windows of sensor signals, like HAPT's of motion.

Shape suffixes: N windows, C channels, T samples in time.
"""

import torch
from torch import Tensor, nn

from fedmoe.nn.classifier import StemAndHead, moe_head
from fedmoe.nn.gates.topk import GateMass
from fedmoe.nn.init import seeded

MOTION_WIDTH = 384  # 64 channels of 6 samples after two convolutions and poolings of 128


def motion_cnn(
    num_experts: int = 16,
    hidden: int = 32,
    k: int = 2,
    num_classes: int = 6,
    seed: int = 0,
    gate_mass: GateMass = "renormalise",
) -> StemAndHead:
    """Two convolutions over time, and experts of width `hidden` that classify.

    Takes (N, 6, 128); 222,592 parameters at the defaults.
    """

    def build() -> StemAndHead:
        head = moe_head(MOTION_WIDTH, hidden, num_classes, num_experts, k, gate_mass)
        return StemAndHead(SignalStem(), head)

    return seeded(build, seed)


class SignalStem(nn.Module):
    """Two convolutions over time, each pooled to a quarter: (N, 6, 128) -> (N, 384).

    With other `channels` it is 6 times the second number.
    """

    def __init__(self, channels: tuple[int, int] = (32, 64)) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(6, channels[0], 9)
        self.conv2 = nn.Conv1d(channels[0], channels[1], 7)

    def forward(self, signal_NCT: Tensor) -> Tensor:
        x = signal_NCT
        for conv in (self.conv1, self.conv2):
            x = nn.functional.max_pool1d(conv(x), 4).relu()
        return torch.flatten(x, 1)
