"""The same stages of many models side by side, in torch: each operation runs once for all of them.

Linear maps of all models are one batched product. Of a MoE layer, the pairs of a model and an
expert that it holds are numbered through; the tokens of all models are sorted by these numbers and
go through two grouped products. So an expert that a model does not hold takes neither memory nor
time. Models stand in an order chosen by the caller, and a forward pass may run the first P alone.

Shape suffixes: K models, P the first of them, B examples of each, D width, E experts of a layer,
H pairs of a model and a held expert, C choices of a token, R pairs of a token and a choice.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedmoe.nn.experts.ffn import FFN, Activation, activate
from fedmoe.nn.gates.topk import masked_softmax, top_k_indices
from fedmoe.nn.stages import Dense, Mixture, Stage

UNIT = 8  # numbers; a row of a grouped product's operand must be a multiple of 16 bytes


@dataclass(eq=False)
class Stack:
    """A parameter of all models: of each model one, or of each pair of a model and an expert."""

    values: Tensor  # (K, ...) or (H, ...); experts' widths are padded with zeros
    sources: list[Tensor]  # parameters, in this order
    mixture: int | None = None  # which of the MoE layers, for an expert's

    def give_back(self) -> None:
        """Into the parameters that it was made of."""
        with torch.no_grad():
            for p, value in zip(self.sources, self.values, strict=True):
                p.copy_(value[tuple(slice(n) for n in p.shape)])


class Choices(NamedTuple):
    """What the gates of one layer decide."""

    best_PBC: Tensor
    weight_PBC: Tensor  # 0 for examples that are only padding
    score_PBE: Tensor
    logit_PBE: Tensor  # -inf for experts that are not present


@dataclass(eq=False)
class StackedDense:
    weight: Stack  # (K, out, in)
    bias: Stack | None
    activation: Activation | None


@dataclass(eq=False)
class StackedMixture:
    """`index` numbers the MoE layers of a model."""

    index: int
    gate: Stack  # (K, E, D)
    up: Stack  # (H, F, D)
    up_bias: Stack | None
    down: Stack  # (H, O, F)
    down_bias: Stack | None
    activation: Activation
    k: int
    full: bool
    total: float  # what weights sum to that are not scores
    residual: bool
    out_dim: int
    present_KE: Tensor
    known_KE: Tensor
    slot_KE: Tensor  # the pair's number; of what is not held, that of some expert that is
    ends: list[int]  # pairs of the first so many models
    model_H: Tensor
    expert_H: Tensor


@dataclass(eq=False)
class StackedModel:
    stages: list[StackedDense | StackedMixture]
    stacks: list[Stack]

    @property
    def mixtures(self) -> list[StackedMixture]:
        return [s for s in self.stages if isinstance(s, StackedMixture)]

    def pairs(self, stack: Stack, models: int) -> int:
        """How many rows of a stack belong to the first so many models."""
        return models if stack.mixture is None else self.mixtures[stack.mixture].ends[models]


Leaves = dict[int, Tensor]  # by id of a stack: the rows of the first P models


def likeness(stages: Sequence[Stage]) -> Hashable | None:
    """Equal of models that can be stacked; None: this one cannot, with any."""
    told: list[Hashable] = []
    for s in stages:
        if isinstance(s, Dense):
            told.append((s.linear.weight.shape, s.linear.bias is None, s.activation))
        elif isinstance(s, Mixture):
            experts = {_expert(e) for e in s.experts.values()}
            if len(experts) != 1:
                return None
            gate = s.gate
            told.append((gate.num_experts, gate.k, gate.gate_mass, s.residual, *experts))
        else:  # convolutions gain nothing, embeddings are not known
            return None
    return tuple(told)


def _expert(e: FFN) -> Hashable:
    return e.activation, tuple((name, p.shape) for name, p in e.named_parameters())


def stack_models(models: Sequence[Sequence[Stage]], device: torch.device) -> StackedModel:
    """Models of one likeness; they may hold different experts."""
    stacks: list[Stack] = []

    def stacked(sources: Sequence[Tensor], mixture: int | None = None) -> Stack:
        values = [p.detach() if mixture is None else _padded(p.detach()) for p in sources]
        stacks.append(Stack(torch.stack(values).to(device), list(sources), mixture))
        return stacks[-1]

    def maybe(
        sources: Sequence[Tensor | None], mixture: int | None = None
    ) -> Stack | None:
        given = [p for p in sources if p is not None]
        return stacked(given, mixture) if given else None

    stages: list[StackedDense | StackedMixture] = []
    layers = 0
    for column in zip(*models, strict=True):
        first = column[0]
        if isinstance(first, Dense):
            linears = [s.linear for s in column if isinstance(s, Dense)]
            weight = stacked([m.weight for m in linears])
            stages.append(StackedDense(weight, maybe([m.bias for m in linears]), first.activation))
        elif isinstance(first, Mixture):
            mixtures = [s for s in column if isinstance(s, Mixture)]
            gate = first.gate
            held = [list(s.experts) for s in mixtures]
            pairs = [(i, e) for i, own in enumerate(held) for e in own]
            experts = [mixtures[i].experts[e] for i, e in pairs]
            ends, slot_KE = [0], torch.zeros(len(held), gate.num_experts, dtype=torch.int64)
            for i, own in enumerate(held):
                slot_KE[i] = ends[-1]
                slot_KE[i, own] = torch.arange(len(own)) + ends[-1]
                ends.append(ends[-1] + len(own))
            stages.append(
                StackedMixture(
                    index=layers,
                    gate=stacked([s.gate.proj.weight for s in mixtures]),
                    up=stacked([x.up.weight for x in experts], layers),
                    up_bias=maybe([x.up.bias for x in experts], layers),
                    down=stacked([x.down.weight for x in experts], layers),
                    down_bias=maybe([x.down.bias for x in experts], layers),
                    activation=experts[0].activation,
                    k=gate.k,
                    full=gate.gate_mass == "full",
                    total=gate.total_weight(gate.k),  # who holds fewer is refused
                    residual=first.residual,
                    out_dim=len(experts[0].down.weight),
                    present_KE=torch.stack([s.moe.present_E for s in mixtures]).to(device),
                    known_KE=torch.stack([s.gate.known_E for s in mixtures]).to(device),
                    slot_KE=slot_KE.to(device),
                    ends=ends,
                    model_H=torch.tensor([i for i, _ in pairs], device=device),
                    expert_H=torch.tensor([e for _, e in pairs], device=device),
                )
            )
            layers += 1
    return StackedModel(stages, stacks)


def forward(
    model: StackedModel, leaves: Leaves, x_PBD: Tensor, keep_PB: Tensor | None
) -> tuple[Tensor, list[Choices]]:
    """The logits of the first P models, and what their gates decide.

    Args:
        leaves: the parameters of these models, cut from the stacks.
        keep_PB: which examples are real; None: all.
    """
    seen = []
    for s in model.stages:
        if isinstance(s, StackedDense):
            x_PBD = torch.bmm(x_PBD, leaves[id(s.weight)].transpose(1, 2))
            if s.bias is not None:
                x_PBD = x_PBD + leaves[id(s.bias)][:, None]
            if s.activation is not None:
                x_PBD = activate(x_PBD, s.activation)
        else:
            choices = _choose(s, leaves[id(s.gate)], x_PBD, keep_PB)
            y_PBO = _mix(s, leaves, x_PBD, choices)
            x_PBD = x_PBD + y_PBO if s.residual else y_PBO
            seen.append(choices)
    return x_PBD, seen


def _choose(
    s: StackedMixture, gate_PED: Tensor, x_PBD: Tensor, keep_PB: Tensor | None
) -> Choices:
    """As `TopKGate.forward`, but without a weight for every expert."""
    num = len(x_PBD)
    present_P1E = (s.present_KE & s.known_KE)[:num, None]
    with torch.autocast(x_PBD.device.type, enabled=False):
        all_PBE = torch.bmm(x_PBD.float(), gate_PED.float().transpose(1, 2))
        logit_PBE = all_PBE.masked_fill(~present_P1E, -torch.inf)
        if s.full:
            score_PBE = masked_softmax(all_PBE, s.known_KE[:num, None])
            own_PBE = score_PBE * present_P1E
            best_PBC = top_k_indices(own_PBE.detach(), s.k)
            weight_PBC = own_PBE.gather(-1, best_PBC)
        else:
            score_PBE = logit_PBE.softmax(-1)
            best_PBC = top_k_indices(logit_PBE.detach(), s.k)
            weight_PBC = s.total * logit_PBE.gather(-1, best_PBC).softmax(-1)
    if keep_PB is not None:
        weight_PBC = weight_PBC * keep_PB[..., None]
    return Choices(best_PBC, weight_PBC, score_PBE, logit_PBE)


def _mix(s: StackedMixture, leaves: Leaves, x_PBD: Tensor, choices: Choices) -> Tensor:
    num, batch, width = x_PBD.shape
    dtype = _dtype(x_PBD)
    pair_R = s.slot_KE[:num].gather(1, choices.best_PBC.flatten(1)).flatten()
    sorted_R, order_R = pair_R.sort(stable=True)
    back_R = torch.empty_like(order_R)
    back_R[order_R] = torch.arange(len(order_R), device=order_R.device)
    end_H = pair_R.bincount(minlength=s.ends[num]).cumsum(0, dtype=torch.int32)
    x_RD = x_PBD.reshape(-1, width).index_select(0, order_R // s.k).to(dtype)
    up_HFD, down_HOF = leaves[id(s.up)].to(dtype), leaves[id(s.down)].to(dtype)
    x_RD = nn.functional.pad(x_RD, (0, up_HFD.shape[2] - width))
    a_RF = nn.functional.grouped_mm(x_RD, up_HFD.transpose(1, 2), offs=end_H)
    if s.up_bias is not None:
        a_RF = a_RF + leaves[id(s.up_bias)].to(dtype).index_select(0, sorted_R)
    h_RF = activate(a_RF, s.activation)
    y_RO = nn.functional.grouped_mm(h_RF, down_HOF.transpose(1, 2), offs=end_H)
    if s.down_bias is not None:
        y_RO = y_RO + leaves[id(s.down_bias)].to(dtype).index_select(0, sorted_R)
    y_RO = y_RO[:, : s.out_dim].index_select(0, back_R)
    y_PBCO = y_RO.view(num, batch, s.k, s.out_dim) * choices.weight_PBC[..., None]
    return y_PBCO.sum(2).to(x_PBD.dtype)


def _padded(t: Tensor) -> Tensor:
    """Zeros behind each dimension, up to whole units."""
    missing = [-n % UNIT for n in t.shape]
    return nn.functional.pad(t, [m for n in reversed(missing) for m in (0, n)])


def _dtype(x: Tensor) -> torch.dtype:
    """What a product of `x` is computed in."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
