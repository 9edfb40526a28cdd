"""Watching gates while a model runs: for activation profiles and for routing losses alike."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from fedmoe.state import moe_layers
from fedmoe.types import ActivationProfile, Routing

MASS_ERROR, FREQUENCY_ERROR = "mass_error", "frequency_error"  # what a scout calls them


@contextmanager
def watch_gates(model: nn.Module) -> Iterator[dict[int, Routing]]:
    """Collect each MoE layer's latest `Routing`, by layer, while the block runs.

    Padding never reaches a gate, so it is not in the routing either.
    """
    seen: dict[int, Routing] = {}

    def keep(layer: int) -> object:
        def hook(_module: nn.Module, _args: object, out: Routing) -> None:
            seen[layer] = out

        return hook

    handles = [
        moe.gate.register_forward_hook(keep(layer))  # type: ignore[arg-type]
        for layer, (_, moe) in enumerate(moe_layers(model))
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def profile_of(routings: Mapping[int, Routing], sizes: Sequence[int]) -> ActivationProfile:
    """The use of experts in one forward pass.

    Args:
        sizes: experts in each MoE layer of the global model (`state.layer_sizes`).
    """
    num_layers, num_experts = len(sizes), max(sizes, default=0)
    count_LE = torch.zeros(num_layers, num_experts, dtype=torch.int64)
    weight_LE = torch.zeros(num_layers, num_experts, dtype=torch.float64)
    score_LE = torch.zeros(num_layers, num_experts, dtype=torch.float64)
    token_L = torch.zeros(num_layers, dtype=torch.int64)
    for layer, routing in routings.items():
        weight_TE, score_TE = routing.weight_TE.detach(), routing.score_TE.detach()
        width = weight_TE.shape[1]
        count_LE[layer, :width] = (weight_TE != 0).sum(0)
        weight_LE[layer, :width] = weight_TE.sum(0, dtype=torch.float64)
        score_LE[layer, :width] = score_TE.sum(0, dtype=torch.float64)
        token_L[layer] = len(weight_TE)
    return ActivationProfile(count_LE, weight_LE, score_LE, token_L)


def errors_of(parts: Sequence[ActivationProfile]) -> dict[str, float]:
    """Squared standard error of a profile's shares, summed over layers and experts, told from
    random parts of its data, of about as many tokens each; nothing from fewer than two.
    """
    if len(parts) < 2:
        return {}
    shares = {
        MASS_ERROR: torch.stack([part.mass_LE for part in parts]),
        FREQUENCY_ERROR: torch.stack([part.frequency_LE for part in parts]),
    }
    return {name: float(p.var(0).sum()) / len(parts) for name, p in shares.items()}


def open_gates(model: nn.Module) -> None:
    """Let every gate choose among all experts whose rows it knows, held or not (a scout's view)."""
    for _, moe in moe_layers(model):
        known_E = getattr(moe.gate, "known_E", None)
        if known_E is not None:
            moe.present_E.copy_(known_E)
