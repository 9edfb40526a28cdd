"""REAP's importance of experts: what each adds to a layer's output, not how often it is used.

REAP (Cerebras, 2025, "REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression",
arXiv:2510.13999) scores an expert by the mean, over the tokens that the gate sends it, of the gate
weight times the norm of the expert's output. A rare expert whose output is large outranks a
frequent one that hardly changes anything; by frequency alone it would be dropped.

`Reaping` is the client and `importance` the server's reading of it: `FedMoE(measure=importance,
explore_trains=True)` chooses by it. A scout holds no experts, so all clients must hold the whole
model while they explore. It costs one pass over the client's training data more, and nothing
where it is not used.

Shape suffixes: T tokens, L MoE layers, E experts, D and O widths.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fedmoe.data.examples import Examples
from fedmoe.federated.local import EVALUATION_BATCH, LocalMethod, LocalTask, Trained
from fedmoe.state import layer_sizes, moe_layers
from fedmoe.types import ActivationProfile, Routing


@dataclass(frozen=True)
class Reaping(LocalMethod):
    """Trains, and reports in place of the gate's scores each expert's importance times its tokens,
    so that such profiles add as others do.
    """

    @property
    def fits(self) -> bool:
        return True

    def train(self, task: LocalTask) -> Trained:
        trained = super().train(task)
        mean_LE = saliency(task.model, task.examples, task.device)
        profile = replace(trained.profile, score_LE=mean_LE * trained.profile.count_LE)
        return replace(trained, profile=profile)


def importance(profile: ActivationProfile) -> Tensor:
    """Of a client that is `Reaping`: its experts' importance, (L, E), each layer's to sum 1."""
    mean_LE = profile.score_LE / profile.count_LE.clamp_min(1)
    total_L1 = mean_LE.sum(-1, keepdim=True)
    return mean_LE / total_L1.clamp_min(torch.finfo(total_L1.dtype).tiny)


@torch.no_grad()
def saliency(model: nn.Module, examples: Examples, device: torch.device) -> Tensor:
    """Gate weight times norm of the output, mean over the tokens that each expert gets, (L, E)
    float64; 0 for experts without tokens, and for those not held.
    """
    layers = [moe for _, moe in moe_layers(model)]
    sizes = layer_sizes(model)
    sum_LE = torch.zeros(len(sizes), max(sizes, default=0), dtype=torch.float64)
    count_LE = torch.zeros_like(sum_LE)

    def watch(layer: int) -> object:
        def hook(_gate: nn.Module, args: tuple[Tensor, ...], routing: Routing) -> None:
            for e in layers[layer].held:
                weight_T = routing.weight_TE[:, e]
                mine_T = weight_T != 0
                y_TO = layers[layer].experts[str(e)](args[0][mine_T])
                sum_LE[layer, e] += float((weight_T[mine_T] * y_TO.norm(dim=-1)).sum())
                count_LE[layer, e] += int(mine_T.sum())

        return hook

    handles = [
        moe.gate.register_forward_hook(watch(layer))  # type: ignore[arg-type]
        for layer, moe in enumerate(layers)
    ]
    model.eval()
    try:
        for x_B in torch.split(examples.x, EVALUATION_BATCH):
            model(x_B.to(device))
    finally:
        for handle in handles:
            handle.remove()
    return sum_LE / count_LE.clamp_min(1)
