"""Building a model from a seed alone, without a draw from torch's global generator."""

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def seeded(build: Callable[[], M], seed: int) -> M:
    """What `build` returns, its linear and convolutional maps and embeddings drawn from `seed`.

    They keep torch's default distributions: uniform within 1/sqrt(inputs) on either side of 0, and
    standard normal for embeddings.
    """
    # The constructors draw too. Their draws are lost, so they must not move the global generator.
    with torch.random.fork_rng(devices=[]):
        model = build()
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            bound = 1 / math.sqrt(module.weight[0].numel())
            nn.init.uniform_(module.weight, -bound, bound, generator=generator)
            if module.bias is not None:
                nn.init.uniform_(module.bias, -bound, bound, generator=generator)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, generator=generator)
    return model
