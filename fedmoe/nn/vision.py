"""Small image models with experts, for images like Fashion-MNIST's.

The CNN is the one usual in work on personalised federated learning (two 5x5 convolutions, a hidden
layer of 512); ours cuts its hidden layer into experts. The ViT follows Dosovitskiy et al. 2020,
"An Image is Worth 16x16 Words", arXiv:2010.11929, with mean pooling instead of a class token, and
MoE layers in place of the feed-forward parts, as Riquelme et al. 2021, arXiv:2106.05974.

Shape suffixes: N images, C channels, P patches, D width.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from fedmoe.nn.classifier import StemAndHead, moe_head
from fedmoe.nn.experts.ffn import FFN
from fedmoe.nn.gates.topk import GateMass, TopKGate
from fedmoe.nn.init import seeded
from fedmoe.nn.moe import MoE
from fedmoe.nn.transformer import Block

CNN_WIDTH = 1024  # 64 channels of 4 x 4 after two convolutions and poolings of 28 x 28

Norm = Literal["none", "batch"]


def fashion_cnn(
    num_experts: int = 16,
    hidden: int = 32,
    k: int = 2,
    num_classes: int = 10,
    seed: int = 0,
    gate_mass: GateMass = "renormalise",
    norm: Norm = "none",
    channels: tuple[int, int] = (32, 64),
) -> StemAndHead:
    """`dense_cnn` with its hidden layer cut into `num_experts` experts of width `hidden`.

    Each expert has its own slice of the classifier, so the MoE layer's output is the logits.
    Takes (N, 1, 28, 28). `norm` is that of the convolutions. With a `k` of what the
    smallest device holds and a `gate_mass` of "sum", sub-MoEs did better than with the defaults on
    all four protocols of images (simulations/results/personal.md: fedmoe, fedmoe-mean).
    """

    def build() -> StemAndHead:
        head = moe_head(16 * channels[1], hidden, num_classes, num_experts, k, gate_mass)
        return StemAndHead(ConvStem(channels, norm), head)

    return seeded(build, seed)


def dense_cnn(
    num_classes: int = 10,
    hidden: int = 512,
    seed: int = 0,
    norm: Norm = "none",
    channels: tuple[int, int] = (32, 64),
) -> StemAndHead:
    """Two convolutions and one hidden layer: 582,026 parameters at the defaults.

    `norm` is that of the convolutions.
    """

    def build() -> StemAndHead:
        return StemAndHead(ConvStem(channels, norm), FFN(16 * channels[1], hidden, num_classes))

    return seeded(build, seed)


class Residual(nn.Module):
    """A part whose input is added to its output."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.inner(x)
        return y


def flat_moe(
    pixels: int = 784,
    dim: int = 64,
    num_experts: int = 8,
    hidden: int = 128,
    k: int = 1,
    num_classes: int = 10,
    seed: int = 0,
    gate_mass: GateMass = "full",
) -> nn.Sequential:
    """A hidden layer of width `dim`, a MoE layer around which a residual leads, and a classifier.

    Takes (N, ...) with `pixels` numbers an image; 184,010 parameters at the defaults. Small enough
    for a step of training to be mostly overhead.
    """

    def build() -> nn.Sequential:
        experts = {e: FFN(dim, hidden) for e in range(num_experts)}
        moe = MoE(TopKGate(dim, num_experts, k, gate_mass=gate_mass), experts, num_experts)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(pixels, dim), nn.ReLU(), Residual(moe),
            nn.Linear(dim, num_classes),
        )

    return seeded(build, seed)


class ConvStem(nn.Module):
    """Two convolutions of 5 x 5, each pooled to half its size: (N, 1, 28, 28) -> (N, 1024).

    With other `channels` it is 16 times the second number; `norm` follows each convolution.
    """

    def __init__(self, channels: tuple[int, int] = (32, 64), norm: Norm = "none") -> None:
        super().__init__()
        if norm not in ("none", "batch"):
            raise ValueError(f'norm must be "none" or "batch", got {norm!r}')
        first, second = channels
        self.conv1 = nn.Conv2d(1, first, 5)
        self.conv2 = nn.Conv2d(first, second, 5)
        self.norm1 = nn.BatchNorm2d(first) if norm == "batch" else nn.Identity()
        self.norm2 = nn.BatchNorm2d(second) if norm == "batch" else nn.Identity()
        # A third of a training step on a CPU is saved by this layout, and by pooling before the
        # ReLU, which commutes with it.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, image_NCHW: Tensor) -> Tensor:
        x = image_NCHW.contiguous(memory_format=torch.channels_last)
        for conv, norm in ((self.conv1, self.norm1), (self.conv2, self.norm2)):
            x = nn.functional.max_pool2d(norm(conv(x)), 2).relu()
        return x.flatten(1)


class PatchStem(nn.Module):
    """Images to patch tokens with learned positions: (N, C, H, W) -> (N, P, D)."""

    def __init__(self, image: int, channels: int, patch: int, dim: int) -> None:
        super().__init__()
        if image % patch:
            raise ValueError(f"image must be a multiple of the patch width {patch}, got {image}")
        self.patches = nn.Conv2d(channels, dim, kernel_size=patch, stride=patch)
        # From 0: the patches alone break the symmetry.
        self.position_PD = nn.Parameter(torch.zeros((image // patch) ** 2, dim))

    def forward(self, image_NCHW: Tensor) -> Tensor:
        token_NPD: Tensor = self.patches(image_NCHW).flatten(2).transpose(1, 2)
        return token_NPD + self.position_PD


class ViT(nn.Module):
    """Patches, blocks, the mean over patches, a linear classifier."""

    def __init__(
        self, stem: PatchStem, block: Callable[[], Block], depth: int, dim: int, num_classes: int
    ) -> None:
        super().__init__()
        self.stem = stem
        self.blocks = nn.Sequential(*(block() for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, image_NCHW: Tensor) -> Tensor:
        token_NPD: Tensor = self.norm(self.blocks(self.stem(image_NCHW)))
        logit_NO: Tensor = self.head(token_NPD.mean(1))
        return logit_NO


def small_vit(
    image: int = 28,
    channels: int = 1,
    patch: int = 7,
    dim: int = 64,
    depth: int = 2,
    heads: int = 4,
    hidden: int = 128,
    num_experts: int = 8,
    k: int = 2,
    num_classes: int = 10,
    seed: int = 0,
    gate_mass: GateMass = "renormalise",
) -> ViT:
    """A ViT of `depth` blocks, each with a MoE layer; 16 tokens an image at the defaults."""

    def block() -> Block:
        experts = {e: FFN(dim, hidden, activation="gelu") for e in range(num_experts)}
        gate = TopKGate(dim, num_experts, k, gate_mass=gate_mass)
        return Block(dim, heads, MoE(gate, experts, num_experts))

    def build() -> ViT:
        return ViT(PatchStem(image, channels, patch, dim), block, depth, dim, num_classes)

    return seeded(build, seed)
