"""A client's training by the compiled loop (`fedmoe.native.client`): as `local.train`, many times
faster for small models. What it cannot do is done by `local.train` itself.

Shape suffixes: N examples, E experts.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from fedmoe.data.examples import Examples
from fedmoe.federated import local
from fedmoe.federated.local import (
    Adjust,
    Correction,
    Forward,
    LocalPlan,
    Phase,
    Slope,
    finite_loss,
    moving_in,
)
from fedmoe.native import client as native
from fedmoe.nn.stages import (
    Convolution,
    Dense,
    Embedding,
    Mixture,
    Stage,
    UnknownPartError,
    only_member,
    parameters_of,
    stages_of,
)
from fedmoe.state import everything, named_by_role, nothing
from fedmoe.types import ActivationProfile, State


def stages_for(model: nn.Module, device: torch.device) -> tuple[Stage, ...] | str:
    """The stages that the compiled loop is to train, or why it cannot train this model.

    Of several members of which one is chosen, these are that one's.
    """
    if device.type != "cpu":
        return f"compiled code runs on the CPU, not on {device}"
    if not native.available():
        return "there is no compiler here, or compiled code is switched off"
    only = only_member(model)
    try:
        stages = stages_of(model if only is None else only.model)
    except UnknownPartError as why:
        return str(why)
    if any(p.dtype != torch.float32 for s in stages for p in parameters_of(s)):
        return "parameters must be float32"
    for s in stages:
        if isinstance(s, Mixture) and len({e.hidden for e in s.experts.values()}) != 1:
            return "experts of a layer must be of one width"
    if only is not None and any(isinstance(s, Mixture) for s in stages):
        return "a member must have no MoE layer of its own"
    return stages


def examples_unfit(
    stages: Sequence[Stage], model: nn.Module, examples: Examples
) -> str | None:
    """What about the examples does not fit the stages of this model; None: they do."""
    x_N, y_N = examples
    first, last = stages[0], stages[-1]
    floats = x_N.dtype == torch.float32 or isinstance(first, Embedding)
    if not floats or y_N.dtype != torch.int64:
        return f"inputs must be float32 and labels int64, got {x_N.dtype} and {y_N.dtype}"
    if isinstance(first, Convolution):
        wanted = first.conv.weight.dim()
        if x_N.dim() != wanted or x_N.shape[1] != first.conv.in_channels:
            return f"inputs must fit the first convolution, got {tuple(x_N.shape)}"
    elif x_N.dim() != 2 and not any(type(m) is nn.Flatten for m in model.modules()):
        return f"inputs must be flat, got {tuple(x_N.shape)}"
    elif x_N[0].numel() != _width(first):
        return f"inputs must have {_width(first)} numbers, got {x_N[0].numel()}"
    if isinstance(first, Embedding):
        why = _out_of_range("codes", x_N.long(), first.table.num_embeddings)
        if why is not None:
            return why
    return _out_of_range("labels", y_N, num_classes(last))


def _out_of_range(name: str, t: Tensor, limit: int) -> str | None:
    low, high = (int(v) for v in t.aminmax())
    if low < 0 or high >= limit:
        return f"{name} must be from 0 to {limit - 1}, got {low} to {high}"
    return None


def train(
    model: nn.Module,
    examples: Examples,
    plan: LocalPlan,
    generator: torch.Generator,
    device: torch.device,
    client: int = 0,
    adjust: Adjust | None = None,
    forward: Forward | None = None,
    towards: State | None = None,
) -> tuple[ActivationProfile, float]:
    """As `local.train`, within 1e-6."""
    stages, only = stages_for(model, device), only_member(model)
    x_N = examples.x if only is None else only.inputs(examples.x)
    y_N = examples.y
    if (
        isinstance(stages, str)
        or x_N is None
        or examples_unfit(stages, only.model if only else model, Examples(x_N, y_N))
        or not (adjust is None or isinstance(adjust, Correction | Slope))
        or (isinstance(adjust, Slope) and plan.proximal)  # one thing to compare with is enough
        or forward is not None
        or (only is not None and plan.z)  # its gate has no logits: an error
    ):
        return local.train(
            model, examples, plan, generator, device, client, adjust, forward, towards
        )
    sizes = [s.gate.num_experts for s in stages if isinstance(s, Mixture)]
    if only is not None:
        sizes = [only.num_members]
    if isinstance(stages[0], Convolution):
        x_N = _channels_last(x_N)
    if isinstance(stages[0], Embedding):
        x_N = x_N.int()
    x_N, y_N = x_N.contiguous(), y_N.contiguous()
    received: dict[int, Tensor] = {}
    if isinstance(adjust, Slope):
        received = {id(p): adjust.origin[name] for name, p in named_by_role(model)}
    elif plan.proximal:
        received = {
            id(p): p.detach().clone() if towards is None else towards[name]
            for name, p in named_by_role(model)
        }
    correction = adjust if isinstance(adjust, Correction) else None
    corrected = {} if correction is None else {id(p): name for name, p in named_by_role(model)}
    num_experts = max(sizes, default=0)
    total = ActivationProfile.empty(len(sizes), num_experts)
    loss_sum, seen = 0.0, 0
    settings = native.Settings(
        lr=plan.lr,
        batch_size=min(plan.batch_size, len(y_N)),
        momentum=plan.momentum,
        weight_decay=plan.weight_decay,
        label_smoothing=plan.label_smoothing,
        balance=plan.balance,
        z=plan.z,
        clip=plan.clip,
        proximal=plan.proximal,
        slope=isinstance(adjust, Slope),
    )
    for phase in plan.phases:
        moving = _moving(phase, plan, model)
        if (moving is not None and not moving) or phase.epochs < 1:
            continue
        orders = [torch.randperm(len(y_N), generator=generator) for _ in range(phase.epochs)]
        weights = _Weights(moving, received, corrected, correction)
        used = native.train(
            list(_native(stages, weights, x_N.shape)),
            x_N,
            y_N,
            torch.stack(orders),
            num_classes(stages[-1]),
            num_experts,
            settings,
        )
        weights.finish()
        for norm in (s.norm for s in stages if isinstance(s, Convolution)):
            if norm is not None and norm.num_batches_tracked is not None:
                norm.num_batches_tracked += phase.epochs * -(-len(y_N) // settings.batch_size)
        if isinstance(adjust, Slope):
            adjust.total += used.slope
        tokens = phase.epochs * len(y_N)
        if only is None:
            told = used.count_LE, used.weight_LE, used.score_LE
        else:
            told = _all_to(only.member, tokens, num_experts)
        total = total + ActivationProfile(*told, torch.full((len(sizes),), tokens))
        loss_sum += used.loss
        seen += tokens
    return total, finite_loss(loss_sum / max(seen, 1), plan, client)


def _all_to(member: int, tokens: int, num_members: int) -> tuple[Tensor, Tensor, Tensor]:
    """How often each member is used, and by which weights and scores, (1, E) each."""
    count_LE = torch.zeros(1, num_members, dtype=torch.int64)
    count_LE[0, member] = tokens
    return count_LE, count_LE.double(), count_LE.double()


def _moving(phase: Phase, plan: LocalPlan, model: nn.Module) -> set[int] | None:
    """The parameters that move, by id; None: all."""
    if phase.trains is everything and plan.frozen is nothing:
        return None
    moves = moving_in(phase, plan)
    return {id(p) for name, p in named_by_role(model) if moves(name)}


def num_classes(last: Stage) -> int:
    """The width of the last stage's output."""
    match last:
        case Dense(linear, _):
            return linear.out_features
        case Mixture():
            return last.moe.out_dim or 0
        case Convolution() | Embedding():
            return 0


def _width(first: Dense | Mixture | Embedding) -> int:
    match first:
        case Dense(linear, _):
            return linear.in_features
        case Mixture():
            return first.gate.dim
        case Embedding():
            return first.length


def _channels_last(x_N: Tensor) -> Tensor:
    """Pictures (N, C, H, W) and signals (N, C, T) as (N, H, W, C) and (N, 1, T, C)."""
    return x_N.movedim(1, -1) if x_N.dim() == 4 else x_N.movedim(1, -1)[:, None]


class _Weights:
    """Parameters as the kernel takes them: themselves where they lie in memory as it wants."""

    def __init__(
        self,
        moving: set[int] | None,
        received: Mapping[int, Tensor],
        corrected: Mapping[int, str],
        correction: Correction | None,
    ) -> None:
        # All by parameters' id.
        self.moving, self.received, self.corrected = moving, received, corrected
        self.correction = correction
        self.copies: list[tuple[Tensor, Tensor]] = []
        self.met: dict[str, tuple[Tensor, Tensor]] = {}  # totals as the parameter lies, and steps

    def of(self, p: Tensor) -> native.Weight:
        moves = self.moving is None or id(p) in self.moving
        value = self._written(p.detach(), moves)
        if not moves:
            return native.Weight(value, moves)
        received, shift, met = self.received.get(id(p)), None, None
        if self.correction is not None:
            name = self.corrected[id(p)]
            shift = self.correction.shift.get(name)
            total, steps = torch.zeros_like(p), torch.zeros(1, dtype=torch.int64)
            self.met[name] = total, steps
            met = native.Met(self._written(total), steps)
        return native.Weight(value, moves, _read(received), _read(shift), met)

    def _written(self, t: Tensor, back: bool = True) -> Tensor:
        """What the kernel may write, and `finish` brings back."""
        ours = _laid_out(t)
        value = ours.contiguous()
        if back and value is not ours:
            self.copies.append((ours, value))
        return value

    def linear(self, m: nn.Linear) -> native.Linear:
        return native.Linear(self.of(m.weight), None if m.bias is None else self.of(m.bias))

    def norm(self, m: nn.BatchNorm2d) -> native.Norm:
        assert m.running_mean is not None and m.running_var is not None and m.momentum is not None
        running = self._written(m.running_mean), self._written(m.running_var)
        return native.Norm(self.of(m.weight), self.of(m.bias), *running, m.momentum, m.eps)

    def finish(self) -> None:
        for ours, value in self.copies:
            ours.copy_(value)
        for name, (total, steps) in self.met.items():
            if self.correction is not None and steps:
                self.correction.add(name, total, int(steps))


def _read(t: Tensor | None) -> Tensor | None:
    return None if t is None else _laid_out(t).contiguous()


def _laid_out(t: Tensor) -> Tensor:
    """A kernel's weights with input channels last; anything else as it is."""
    return _channels_last(t) if t.dim() > 2 else t


def _native(
    stages: Sequence[Stage], weights: _Weights, shape: Sequence[int]
) -> Iterator[native.Stage]:
    height, width = (shape[1], shape[2]) if len(shape) == 4 else (1, 1)
    for i, stage in enumerate(stages):
        match stage:
            case Dense(linear, activation):
                yield native.Dense(weights.linear(linear), activation)
            case Mixture():
                yield _mixture(stage, weights)
            case Embedding(table, _):
                yield native.Embedding(weights.of(table.weight))
            case Convolution(conv, pool, norm):
                last = not isinstance(stages[i + 1], Convolution)
                kernel = weights.of(conv.weight)
                assert conv.bias is not None
                yield native.Convolution(
                    kernel,
                    weights.of(conv.bias),
                    (height, width),
                    pool,
                    last,
                    None if norm is None else weights.norm(norm),
                )
                _, high, wide, _ = kernel.value.shape
                height, width = (height - high + 1) // pool[0], (width - wide + 1) // pool[1]


def _mixture(stage: Mixture, weights: _Weights) -> native.Mixture:
    gate = stage.gate
    experts = {
        number: native.Expert(weights.linear(e.up), weights.linear(e.down), e.activation)
        for number, e in stage.experts.items()
    }
    return native.Mixture(
        weights.of(gate.proj.weight),
        gate.known_E.tolist(),
        experts,
        min(gate.k, len(experts)),
        gate.gate_mass == "full",
        stage.residual,
        gate.total_weight(len(experts)),
    )
